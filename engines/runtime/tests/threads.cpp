// glip_threads BUNDLE CACHE: several threads at once, for the sanitizers: clones that encode and detect, one detector in
// several threads, prompts that pass between them, a detector that is closed in the middle, and the C interface.

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>

#include "glip/glip.h"
#include "glip/glip.hpp"

namespace {

using Found = std::vector<glip::Detection>;

void demand(bool truth, const char* what) {
  if (truth) return;
  std::fprintf(stderr, "threads: %s\n", what);
  std::exit(1);
}

bool same(const Found& a, const Found& b) {
  if (a.size() != b.size()) return false;
  for (std::size_t i = 0; i < a.size(); ++i) {
    if (a[i].score != b[i].score || a[i].x1 != b[i].x1 || a[i].label != b[i].label || a[i].phrase != b[i].phrase) return false;
  }
  return true;
}

void in_threads(int count, const std::function<void(int)>& body) {
  std::vector<std::thread> threads;
  threads.reserve(static_cast<std::size_t>(count));
  for (int i = 0; i < count; ++i) threads.emplace_back(body, i);
  for (std::thread& thread : threads) thread.join();
}

std::vector<std::string> many(int from) {
  std::vector<std::string> out;
  out.reserve(90);
  for (int i = 0; i < 90; ++i) out.push_back("kind " + std::to_string(from + i) + " of traffic light");
  return out;
}

void clones(const glip::Detector& detector, const glip::ImageView& view) {
  std::vector<Found> found(4);
  in_threads(4, [&](int thread) {
    glip::Detector mine = detector.clone();
    for (int round = 0; round < 10; ++round) {
      const glip::Prompt prompt = mine.encode({"dog", "owl " + std::to_string(round)});
      const glip::Prompt list = mine.encode(many(round % 2));
      for (const auto& one : mine.detect_prompts(view, {prompt, list}, 0.1f)) {
        found[static_cast<std::size_t>(thread)].insert(found[static_cast<std::size_t>(thread)].end(), one.begin(), one.end());
      }
    }
  });
  demand(!found[0].empty(), "clones found nothing");
  for (const Found& one : found) demand(same(one, found[0]), "clones do not agree");
}

void one_detector(glip::Detector& detector, const glip::ImageView& view) {
  std::mutex mutex;
  glip::Prompt shared = detector.encode("dog. cat");
  const glip::Prompt first = shared;
  const Found wanted = detector.detect(view, first, 0.1f);
  in_threads(4, [&](int thread) {
    for (int round = 0; round < 20; ++round) {
      if (thread == 0) {
        const glip::Prompt next = detector.encode("owl " + std::to_string(round));
        const std::lock_guard<std::mutex> lock(mutex);
        shared = next;
      }
      glip::Prompt prompt;
      {
        const std::lock_guard<std::mutex> lock(mutex);
        prompt = shared;
      }
      detector.detect({view, view}, prompt, 0.1f);
      demand(same(detector.detect(view, first, 0.1f), wanted), "one detector in several threads gave two answers");
    }
  });
}

void closed_meanwhile(const glip::Detector& detector, const glip::ImageView& view) {
  for (int round = 0; round < 5; ++round) {
    glip::Detector mine = detector.clone();
    const glip::Prompt prompt = mine.encode("dog");
    std::atomic<int> frames{0}, refused{0};
    in_threads(4, [&](int thread) {
      if (thread == 0) {
        while (frames < 3) std::this_thread::yield();
        mine.close();
        return;
      }
      try {
        for (int i = 0;; ++i, ++frames) {
          if (thread == 1) mine.clone().detect(view, prompt);
          if (thread == 2) mine.encode("frame " + std::to_string(1000 * round + i));
          if (thread == 3) mine.detect(view, prompt);
        }
      } catch (const glip::Error& error) {
        demand(error.kind() == glip::ErrorKind::closed, error.what());
        ++refused;
      }
    });
    demand(refused == 3, "not all threads were told that the detector is closed");
  }
}

void c_interface(const char* bundle, const char* cache, const glip::ImageView& view) {
  glip_options options = GLIP_OPTIONS_INIT;
  options.cache_dir = cache;
  options.shortest_side = 64;
  glip_detector* detector = nullptr;
  demand(glip_open(bundle, &options, &detector) == GLIP_OK, glip_last_error());
  in_threads(3, [&](int) {
    glip_detector* mine = nullptr;
    glip_prompt* prompts[2] = {};
    glip_detections *alone = nullptr, *of_each[2] = {};
    glip_image image = GLIP_IMAGE_INIT;
    image.data = view.data;
    image.width = view.width;
    image.height = view.height;
    const glip_image* images[2] = {&image, &image};
    const char* const names[] = {"dog", "cat"};
    demand(glip_clone(detector, &mine) == GLIP_OK, glip_last_error());
    demand(glip_encode(mine, "dog. owl", &prompts[0]) == GLIP_OK, glip_last_error());
    demand(glip_encode_chunks(mine, names, 2, 1, &prompts[1]) == GLIP_OK, glip_last_error());
    demand(glip_prompt_chunks(prompts[1]) == 2, "there are not two chunks");
    demand(glip_detect(mine, &image, prompts[0], 0.1f, &alone) == GLIP_OK, glip_last_error());
    demand(glip_detections_count(alone) > 0, "the C interface found nothing");
    demand(glip_detect_batch(mine, images, 2, prompts[0], 0.1f, of_each) == GLIP_OK, glip_last_error());
    for (glip_detections*& one : of_each) {
      demand(glip_detections_count(one) == glip_detections_count(alone), "a batch finds something else");
      glip_detections_free(one);
      one = nullptr;
    }
    demand(glip_detect_prompts(mine, &image, prompts, 2, 0.1f, of_each) == GLIP_OK, glip_last_error());
    for (glip_detections* one : of_each) glip_detections_free(one);
    demand(glip_detect_prompts(mine, &image, prompts, 2, 2.0f, of_each) == GLIP_OPTION, "a threshold of 2 is taken");
    demand(!of_each[0] && !of_each[1], "an error leaves pointers");
    image.pitch = 1;
    demand(glip_detect_batch(mine, images, 2, prompts[0], 0.1f, of_each) == GLIP_FRAME, "a pitch of 1 is taken");
    glip_detections_free(alone);
    for (glip_prompt* prompt : prompts) glip_prompt_free(prompt);
    glip_close(mine);
  });
  glip_close(detector);
}

}  // namespace

int main(int count, char** arguments) {
  demand(count == 3, "usage: glip_threads BUNDLE CACHE");
  std::vector<unsigned char> pixels(std::size_t{64} * 48 * 3);
  for (std::size_t i = 0; i < pixels.size(); ++i) pixels[i] = static_cast<unsigned char>(i * 7 % 251);
  const glip::ImageView view{pixels.data(), 64, 48};
  try {
    glip::Options options;
    options.shortest_side = 64;
    options.cache_dir = arguments[2];
    glip::Detector detector = glip::Detector::open(arguments[1], options);
    clones(detector, view);
    one_detector(detector, view);
    closed_meanwhile(detector, view);
  } catch (const glip::Error& error) {
    demand(false, error.what());
  }
  c_interface(arguments[1], arguments[2], view);
  std::puts("done");
}
