// glip_detect_image BUNDLE PROMPT IMAGE [options]: detect in one picture, print the JSON line of glip-detect.

#include <fstream>
#include <iostream>

#include "common.hpp"
#include "picture.hpp"

namespace {

const char* const kUsage =
    "usage: glip_detect_image BUNDLE PROMPT IMAGE [--threshold P] [--shortest-side PX] [--longest-side PX]\n"
    "                         [--backend NAME] [--precision f32|bf16|auto] [--json FILE]\n"
    "IMAGE is a binary PPM or PGM file. --longest-side 0 is no limit.\n";

int run(const std::vector<std::string>& given) {
  Arguments arguments;
  arguments.parse(given, "a picture", [](const std::string&, const std::string&) { return false; });
  const std::string& file = arguments.names[2];

  const Picture picture = read_picture(file);
  glip::Detector detector = glip::Detector::open(arguments.names[0], arguments.options);
  const glip::Prompt prompt = detector.encode(arguments.names[1]);
  glip::ImageView view;
  view.data = picture.pixels.data();
  view.width = picture.width;
  view.height = picture.height;
  view.format = picture.channels == 1 ? glip::PixelFormat::gray : glip::PixelFormat::rgb;
  const std::string line = line_of(file, 0, picture.width, picture.height, detector.detect(view, prompt, arguments.threshold));
  if (arguments.json.empty() || arguments.json == "-") {
    std::cout << line;
  } else if (!(std::ofstream(arguments.json) << line)) {
    throw std::runtime_error(arguments.json + " cannot be written; choose another place");
  }
  return 0;
}

}  // namespace

int main(int count, char** arguments) {
  try {
    return run({arguments + 1, arguments + count});
  } catch (const std::invalid_argument& error) {
    std::cerr << "glip_detect_image: error: " << error.what() << "\n" << kUsage;
    return 2;
  } catch (const std::exception& error) {
    std::cerr << "glip_detect_image: error: " << error.what() << "\n";
    return 1;
  }
}
