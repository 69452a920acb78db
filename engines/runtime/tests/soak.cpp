// glip_soak BUNDLE CACHE FRAMES EVERY [SEED]: detect in many frames while prompts, sizes, batches and clones change, from a
// seed. For the first half detectors are opened and closed, for the second half one stays open. A JSON line about the process
// about each EVERY frames: in the first half while no detector is open. benchmarks/robustness/soak_cpp.py says what may grow.

#include <malloc.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <random>
#include <string>
#include <vector>

#include "glip/glip.hpp"

namespace {

class Soak {
 public:
  Soak(const char* bundle, const char* cache, long frames, long every, std::uint64_t seed)
      : bundle_(bundle), cache_(cache), frames_(frames), every_(every), random_(seed), pixels_(std::size_t{256} * 256 * 3) {
    for (unsigned char& value : pixels_) value = static_cast<unsigned char>(below(256));
  }

  void run() {
    while (done_ < frames_ / 2) {
      // A detector lives for some hundred frames, a clone of it for a part of them.
      live(static_cast<long>(1 + below(std::clamp(frames_ / 8, 1L, 300L))), frames_ / 2);
      malloc_trim(0);  // what the allocator keeps for later is no growth
      if (done_ >= next_) sample("closed");
    }
    one_ = true;
    live(frames_, frames_);
  }

 private:
  /// Opens a detector for so many frames, but no further than `end`.
  void live(long frames, long end) {
    end = std::min(end, done_ + frames);
    glip::Options options;
    options.shortest_side = pick<int>({96, 128, 160});
    options.threads = 1;
    options.cache = one_ || below(10) < 8;
    options.cache_dir = cache_;
    glip::Detector detector = glip::Detector::open(bundle_, options);
    while (done_ < end) {
      glip::Detector clone = detector.clone();
      stretch(detector, end);
      stretch(clone, end);
    }
  }

  /// Some frames with a prompt, which changes now and then.
  void stretch(glip::Detector& detector, long end) {
    glip::Prompt prompt = next_prompt(detector);
    for (std::size_t count = 1 + below(50); count > 0 && done_ < end; --count) {
      if (below(10) == 0) prompt = next_prompt(detector);
      const glip::ImageView view = next_view();
      const float threshold = static_cast<float>(below(1000)) / 1000.0f;
      const std::size_t kind = below(20);
      if (kind == 0) {
        detector.detect_prompts(view, {prompt, next_prompt(detector)}, threshold);
        frame();
      } else if (kind < 4) {
        detector.detect({view, view}, prompt, threshold);
        frame();
        frame();
      } else {
        detector.detect(view, prompt, threshold);
        frame();
      }
    }
  }

  /// A few prompts return again and again, most are new; one in twenty is a list of several chunks.
  glip::Prompt next_prompt(glip::Detector& detector) {
    static const std::vector<std::string> kNames = {
        "dog",   "cat",    "owl",   "penguin", "horse", "cow",    "sheep", "bird",   "bicycle", "car",   "bus",   "train",
        "boat",  "guitar", "piano", "violin",  "apple", "banana", "pear",  "cup",    "bottle",  "chair", "table", "lamp",
        "clock", "book",   "key",   "kite",    "tree",  "flower", "house", "bridge", "tent",    "ball",  "drum",  "umbrella"};
    static const std::vector<std::string> kColors = {"red ", "green ", "blue ", "yellow ", "purple ", ""};
    const std::size_t kind = below(20);
    if (kind < 6) return kind % 2 ? detector.encode({"dog", "red apple"}) : detector.encode("a [red ball] beside a [dog]");
    std::vector<std::string> names;
    const std::size_t first = below(kNames.size()), count = kind == 6 ? 150 : 1 + below(16);
    for (std::size_t i = 0; i < count; ++i) {
      names.push_back(pick(kColors) + kNames[(first + i) % kNames.size()] + (i < kNames.size() ? "" : " " + std::to_string(i)));
    }
    if (kind < 13) return detector.encode(names);
    std::string text;
    for (const std::string& name : names) text += name + ". ";
    return detector.encode(text);
  }

  glip::ImageView next_view() {
    static const std::vector<std::pair<int, int>> kSizes = {{120, 90}, {90, 120}, {160, 160}, {224, 96}, {135, 240}};
    const auto [width, height] = pick(kSizes);
    return {pixels_.data(), width, height, std::size_t{256} * 3};
  }

  void frame() {
    ++done_;
    if (one_ && done_ >= next_) sample("open");
  }

  void sample(const char* when) {
    next_ = (done_ / every_ + 1) * every_;
    std::ifstream status("/proc/self/status");
    double resident = 0;
    long threads = 0;
    for (std::string line; std::getline(status, line);) {
      if (line.rfind("VmRSS:", 0) == 0) resident = std::atof(line.c_str() + 6) / 1024;
      if (line.rfind("Threads:", 0) == 0) threads = std::atol(line.c_str() + 8);
    }
    status.close();
    long descriptors = 0;
    for ([[maybe_unused]] const auto& entry : std::filesystem::directory_iterator("/proc/self/fd")) ++descriptors;
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - started_;
    std::printf(
        "{\"when\": \"%s\", \"frames\": %ld, \"seconds\": %.1f, \"resident_mb\": %.2f, \"descriptors\": %ld, \"threads\": "
        "%ld}\n",
        when, done_, seconds.count(), resident, descriptors, threads);
    std::fflush(stdout);
  }

  std::size_t below(std::size_t limit) { return static_cast<std::size_t>(random_() % limit); }
  template <typename T>
  T pick(const std::vector<T>& values) {
    return values[below(values.size())];
  }

  std::string bundle_, cache_;
  long frames_, every_, done_ = 0, next_ = 0;
  bool one_ = false;
  std::mt19937_64 random_;
  std::vector<unsigned char> pixels_;
  std::chrono::steady_clock::time_point started_ = std::chrono::steady_clock::now();
};

}  // namespace

int main(int count, char** arguments) {
  const long frames = count > 4 ? std::atol(arguments[3]) : 0, every = count > 4 ? std::atol(arguments[4]) : 0;
  if (frames < 1 || every < 1) {
    std::fprintf(stderr, "usage: glip_soak BUNDLE CACHE FRAMES EVERY [SEED]\n");
    return 2;
  }
  try {
    Soak(arguments[1], arguments[2], frames, every, count > 5 ? std::strtoull(arguments[5], nullptr, 10) : 0).run();
  } catch (const glip::Error& error) {
    std::fprintf(stderr, "glip_soak: error: %s\n", error.what());
    return 1;
  }
}
