// glip_video BUNDLE PROMPT SOURCE [options]: detect in a video, a camera or a stream, and show the boxes in a window or
// write them to a video. A line typed while it runs is the next prompt.

#include <poll.h>
#include <unistd.h>

#include <array>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <csignal>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iomanip>
#include <iostream>
#include <mutex>
#include <opencv2/core.hpp>
#include <opencv2/core/utils/logger.hpp>
#include <opencv2/imgproc.hpp>
#include <opencv2/videoio.hpp>
#include <optional>
#include <thread>

#ifdef GLIP_WINDOW
#include <opencv2/highgui.hpp>
#endif

#include "common.hpp"

namespace {

namespace fs = std::filesystem;

const char* const kUsage =
    "usage: glip_video BUNDLE PROMPT SOURCE [--output FILE] [--json FILE] [--threshold P] [--shortest-side PX]\n"
    "                  [--longest-side PX] [--backend NAME] [--precision f32|bf16|auto] [--max-frames N]\n"
    "SOURCE is a video, the number or device of a camera, or an address (rtsp://, http://). Without --output and --json\n"
    "a window is opened; q closes it. --json - is standard output. A line typed while it runs is the next prompt.\n";
constexpr int kTimeout = 10'000;  // ms without a frame of a stream
const char* const kWindow = "glip_video";

volatile std::sig_atomic_t stopped_by = 0;
void stop(int signal) { stopped_by = signal; }

bool is_live(const std::string& source) {
  const bool number = !source.empty() && source.find_first_not_of("0123456789") == std::string::npos;
  return number || source.find("://") != std::string::npos || source.rfind("/dev/", 0) == 0;
}

/// Frames of a video, one after the other; of a camera or a stream, always the newest, whatever came before it.
class Source {
 public:
  explicit Source(const std::string& name) : live_(is_live(name)) {
    if (!live_ && !fs::is_regular_file(name)) {
      throw std::runtime_error("video " + name + " does not exist; give a file, a camera's number or an address");
    }
    if (name.find_first_not_of("0123456789") == std::string::npos) {
      capture_.open(number<int>("SOURCE", name));
    } else {
      capture_.open(name, cv::CAP_FFMPEG, {cv::CAP_PROP_OPEN_TIMEOUT_MSEC, kTimeout, cv::CAP_PROP_READ_TIMEOUT_MSEC, kTimeout});
      if (!capture_.isOpened()) capture_.open(name);
    }
    if (!capture_.isOpened()) {
      throw std::runtime_error(name + " cannot be opened; check that it is a video, a camera or a stream that is there");
    }
    if (live_) thread_ = std::thread([this] { follow(); });
  }

  ~Source() {
    ended_ = true;
    if (thread_.joinable()) thread_.join();
  }
  Source(const Source&) = delete;
  Source& operator=(const Source&) = delete;

  bool live() const { return live_; }
  double fps() const {
    const double fps = capture_.get(cv::CAP_PROP_FPS);
    return fps > 0 && fps <= 240 ? fps : 25;
  }
  long dropped() const { return dropped_; }

  /// The next frame, with its number among all that the source gave; false at the end.
  bool next(cv::Mat& frame, long& index) {
    if (!live_) {
      index = ++count_;
      return capture_.read(frame);
    }
    std::unique_lock<std::mutex> lock(mutex_);
    while (!fresh_ && !ended_ && !stopped_by) changed_.wait_for(lock, std::chrono::milliseconds(100));
    if (!fresh_) return false;
    std::swap(frame, newest_);  // the reader writes into the one that was just used
    index = count_;
    fresh_ = false;
    return true;
  }

 private:
  void follow() {
    cv::Mat frame;
    while (!ended_ && capture_.read(frame)) {
      const std::lock_guard<std::mutex> lock(mutex_);
      if (fresh_) ++dropped_;
      std::swap(frame, newest_);
      ++count_;
      fresh_ = true;
      changed_.notify_one();
    }
    ended_ = true;
    changed_.notify_one();
  }

  bool live_;
  cv::VideoCapture capture_;
  std::thread thread_;
  std::mutex mutex_;
  std::condition_variable changed_;
  cv::Mat newest_;
  bool fresh_ = false;
  std::atomic<bool> ended_{false};
  std::atomic<long> dropped_{0};
  long count_ = -1;
};

/// The lines of standard input, encoded by a clone, so that frames go on meanwhile.
class Typed {
 public:
  explicit Typed(glip::Detector detector) : detector_(std::move(detector)), thread_([this] { follow(); }) {}
  ~Typed() {
    ended_ = true;
    thread_.join();
  }
  Typed(const Typed&) = delete;
  Typed& operator=(const Typed&) = delete;

  /// The prompt that was typed since the last call, if there is one.
  std::optional<glip::Prompt> take() {
    const std::lock_guard<std::mutex> lock(mutex_);
    std::optional<glip::Prompt> out;
    out.swap(next_);
    return out;
  }

 private:
  void follow() {
    std::string line;
    while (!ended_) {
      pollfd input{STDIN_FILENO, POLLIN, 0};
      if (::poll(&input, 1, 100) <= 0) continue;
      std::array<char, 4096> bytes{};
      const ssize_t count = ::read(STDIN_FILENO, bytes.data(), bytes.size());
      if (count <= 0) return;
      for (ssize_t i = 0; i < count; ++i) {
        const char c = bytes[static_cast<std::size_t>(i)];
        if (c != '\n') {
          line += c;
        } else {
          encode(line);
          line.clear();
        }
      }
    }
  }

  void encode(const std::string& line) {
    if (line.find_first_not_of(" \t\r") == std::string::npos) return;
    try {
      const glip::Prompt prompt = detector_.encode(line);
      const std::lock_guard<std::mutex> lock(mutex_);
      next_ = prompt;
    } catch (const glip::Error& error) {  // the prompt before stays
      std::cerr << "glip_video: " << error.what() << "\n";
    }
  }

  glip::Detector detector_;
  std::mutex mutex_;
  std::optional<glip::Prompt> next_;
  std::atomic<bool> ended_{false};
  std::thread thread_;
};

cv::Scalar color_of(int label) {
  static const std::array<cv::Scalar, 8> kColors = {
      cv::Scalar(60, 76, 231),  cv::Scalar(96, 174, 39),  cv::Scalar(219, 152, 52), cv::Scalar(18, 156, 243),
      cv::Scalar(182, 89, 155), cv::Scalar(156, 188, 26), cv::Scalar(94, 73, 52),   cv::Scalar(34, 126, 230)};
  return kColors[static_cast<std::size_t>(label) % kColors.size()];
}

/// Draw boxes with their phrases, the best last. OpenCV's letters are those of ASCII; others become question marks.
void annotate(cv::Mat& frame, const std::vector<glip::Detection>& found) {
  const double scale = std::max(0.4, std::min(frame.cols, frame.rows) / 1000.0);
  const int width = std::max(1, static_cast<int>(scale * 3));
  for (auto one = found.rbegin(); one != found.rend(); ++one) {
    const cv::Point corner(static_cast<int>(one->x1), static_cast<int>(one->y1));
    cv::rectangle(frame, corner, cv::Point(static_cast<int>(one->x2), static_cast<int>(one->y2)), color_of(one->label), width);
    std::ostringstream text;
    text << one->phrase << " " << std::fixed << std::setprecision(2) << one->score;
    int below = 0;
    const cv::Size size = cv::getTextSize(text.str(), cv::FONT_HERSHEY_SIMPLEX, scale, 1, &below);
    const int top = std::max(0, corner.y - size.height - below);
    cv::rectangle(frame, cv::Rect(corner.x, top, size.width, size.height + below), color_of(one->label), cv::FILLED);
    cv::putText(frame, text.str(), cv::Point(corner.x, top + size.height), cv::FONT_HERSHEY_SIMPLEX, scale,
                cv::Scalar(255, 255, 255), 1, cv::LINE_AA);
  }
}

/// A video that appears under its name when it is finished.
class Video {
 public:
  Video(const std::string& file, double fps, bool live) : file_(file), fps_(fps), live_(live) {
    const std::string kind = fs::path(file).extension().string();
    if (kind != ".mp4" && kind != ".mkv" && kind != ".avi") {
      throw std::runtime_error("output " + file + " must end in .mp4, .mkv or .avi");
    }
    partial_ = (fs::path(file).parent_path() / ("." + fs::path(file).stem().string() + ".part" + kind)).string();
  }
  ~Video() {
    writer_.release();
    std::error_code ignored;
    fs::remove(partial_, ignored);
  }
  Video(const Video&) = delete;
  Video& operator=(const Video&) = delete;

  void write(cv::Mat& frame) {
    if (!writer_.isOpened()) {
      size_ = frame.size();
      started_ = std::chrono::steady_clock::now();
      const int code = fs::path(file_).extension() == ".avi" ? cv::VideoWriter::fourcc('M', 'J', 'P', 'G')
                                                             : cv::VideoWriter::fourcc('m', 'p', '4', 'v');
      if (!writer_.open(partial_, code, fps_, size_))
        throw std::runtime_error(file_ + " cannot be written; choose another place");
    }
    if (frame.size() != size_) cv::resize(frame, frame, size_);
    // Of a live source frames are missing: those that are there stand in for them, so that time passes as it did.
    const double elapsed = std::chrono::duration<double>(std::chrono::steady_clock::now() - started_).count();
    const long due = live_ ? std::max(written_ + 1, static_cast<long>(elapsed * fps_)) : written_ + 1;
    for (; written_ < due; ++written_) writer_.write(frame);
  }

  void finish() {
    if (!writer_.isOpened()) return;
    writer_.release();
    std::error_code failed;
    fs::rename(partial_, file_, failed);
    if (failed) throw std::runtime_error(file_ + " cannot be written (" + failed.message() + "); choose another place");
  }

 private:
  std::string file_, partial_;
  double fps_;
  bool live_;
  cv::VideoWriter writer_;
  cv::Size size_;
  std::chrono::steady_clock::time_point started_;
  long written_ = 0;
};

/// Whether a window can be opened: Qt, which draws it in some builds of OpenCV, ends the program where it cannot.
void check_window() {
#ifndef GLIP_WINDOW
  throw std::runtime_error(std::string(kWindow) + " was built without OpenCV's highgui; give --output FILE or --json FILE");
#elif defined(__linux__)
  for (const char* name : {"DISPLAY", "WAYLAND_DISPLAY", "QT_QPA_PLATFORM"}) {
    if (const char* value = std::getenv(name); value && *value) return;
  }
  throw std::runtime_error("no window can be opened here; give --output FILE or --json FILE");
#endif
}

/// Show a frame; false when the user closed the window.
bool show([[maybe_unused]] const cv::Mat& frame) {
#ifdef GLIP_WINDOW
  cv::imshow(kWindow, frame);
  const int key = cv::waitKey(1) & 255;
  return key != 'q' && key != 27 && cv::getWindowProperty(kWindow, cv::WND_PROP_VISIBLE) >= 1;
#else
  return false;
#endif
}

int run(const std::vector<std::string>& given) {
  Arguments arguments;
  std::string output;
  long most = 0;
  arguments.parse(given, "a video, camera or stream", [&](const std::string& option, const std::string& value) {
    if (option == "--output") {
      output = value;
    } else if (option == "--max-frames") {
      most = number<long>(option, value);
      if (most < 1) throw std::invalid_argument(option + " is " + value + "; legal is 1 or more");
    } else {
      return false;
    }
    return true;
  });
  const std::string& name = arguments.names[2];
  std::error_code ignored;
  for (const std::string& file : {output, arguments.json}) {
    if (!file.empty() && fs::equivalent(file, name, ignored)) {
      throw std::runtime_error(file + " is the source; choose another place for what is written");
    }
  }

  Source source(name);
  std::optional<Video> video;
  if (!output.empty()) video.emplace(output, source.fps(), source.live());
  if (output.empty() && arguments.json.empty()) check_window();
  glip::Detector detector = glip::Detector::open(arguments.names[0], arguments.options);
  glip::Prompt prompt = detector.encode(arguments.names[1]);
  std::ofstream file;
  if (!arguments.json.empty() && arguments.json != "-") file.open(arguments.json);
  std::ostream& lines = arguments.json == "-" ? std::cout : file;
  Typed typed(detector.clone());
  std::signal(SIGINT, stop);
  std::signal(SIGTERM, stop);

  const auto started = std::chrono::steady_clock::now();
  cv::Mat frame;
  long index = 0, frames = 0;
  while (!stopped_by && (most == 0 || frames < most) && source.next(frame, index)) {
    if (auto next = typed.take()) prompt = *next;
    glip::ImageView view;
    view.data = frame.data;
    view.width = frame.cols;
    view.height = frame.rows;
    view.pitch = frame.step;
    const auto found = detector.detect(view, prompt, arguments.threshold);
    ++frames;
    if (!arguments.json.empty() && !(lines << line_of(name, index, frame.cols, frame.rows, found) << std::flush)) {
      throw std::runtime_error(arguments.json + " cannot be written; choose another place");
    }
    if (!video && !arguments.json.empty()) continue;
    annotate(frame, found);
    if (video) {
      video->write(frame);
    } else if (!show(frame)) {
      break;
    }
  }
  if (frames == 0 && !stopped_by) throw std::runtime_error(name + " gives no frames; check that it is a video");
  if (video) video->finish();
  const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - started).count();
  std::cerr << "glip_video: " << frames << " frames in " << std::fixed << std::setprecision(1) << seconds << " s, "
            << source.dropped() << " dropped\n";
  return stopped_by ? 128 + stopped_by : 0;
}

}  // namespace

int main(int count, char** arguments) {
  cv::utils::logging::setLogLevel(cv::utils::logging::LOG_LEVEL_SILENT);
  ::setenv("OPENCV_FFMPEG_LOGLEVEL", "-8", 0);
  try {
    return run({arguments + 1, arguments + count});
  } catch (const std::invalid_argument& error) {
    std::cerr << "glip_video: error: " << error.what() << "\n" << kUsage;
    return 2;
  } catch (const std::exception& error) {
    std::cerr << "glip_video: error: " << error.what() << "\n";
    return 1;
  }
}
