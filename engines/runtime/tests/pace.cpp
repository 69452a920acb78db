// glip_pace BUNDLE PROMPT PICTURE SHORTEST_SIDE THREADS: opens a detector on OpenVINO and says how long that took; then, for
// each number that comes in a line, the milliseconds of so many frames. benchmarks/runtime/compare.py measures it in turn with
// Python.

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iostream>
#include <string>

#include "../examples/picture.hpp"
#include "glip/glip.hpp"

namespace {

using Clock = std::chrono::steady_clock;

double since(Clock::time_point start) { return std::chrono::duration<double, std::milli>(Clock::now() - start).count(); }

double peak_mb() {
  std::ifstream status("/proc/self/status");
  for (std::string line; std::getline(status, line);) {
    if (line.rfind("VmHWM:", 0) == 0) return std::atof(line.c_str() + 6) / 1024;
  }
  return 0;
}

int run(char** arguments) {
  const Picture picture = read_picture(arguments[3]);
  glip::ImageView view{picture.pixels.data(), picture.width, picture.height};
  view.format = glip::PixelFormat::rgb;
  glip::Options options;
  options.shortest_side = std::atoi(arguments[4]);
  options.threads = std::atoi(arguments[5]);
  options.cache = false;
  auto start = Clock::now();
  glip::Detector detector = glip::Detector::open(arguments[1], options);
  const double opened = since(start);
  start = Clock::now();
  const glip::Prompt prompt = detector.encode(std::string(arguments[2]));
  std::printf("{\"open_ms\": %.3f, \"encode_ms\": %.3f}\n", opened, since(start));
  std::fflush(stdout);
  long count = 0;
  while (std::cin >> count) {
    std::size_t found = 0;
    std::printf("{\"ms\": [");
    for (long i = 0; i < count; ++i) {
      start = Clock::now();
      found = detector.detect(view, prompt, 0.3f).size();
      std::printf("%s%.3f", i ? ", " : "", since(start));
    }
    std::printf("], \"found\": %zu, \"peak_mb\": %.1f}\n", found, peak_mb());
    std::fflush(stdout);
  }
  return 0;
}

}  // namespace

int main(int count, char** arguments) {
  if (count != 6) {
    std::fprintf(stderr, "usage: glip_pace BUNDLE PROMPT PICTURE SHORTEST_SIDE THREADS\n");
    return 2;
  }
  try {
    return run(arguments);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "glip_pace: error: %s\n", error.what());
    return 1;
  }
}
