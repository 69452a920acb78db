// glip_detect_image BUNDLE PROMPT IMAGE [options]: detect in one picture, print the JSON line of glip-detect.

#include <cstdio>
#include <fstream>
#include <iostream>
#include <limits>
#include <sstream>

#include "glip/glip.hpp"
#include "picture.hpp"

namespace {

const char* const kUsage =
    "usage: glip_detect_image BUNDLE PROMPT IMAGE [--threshold P] [--shortest-side PX] [--longest-side PX]\n"
    "                         [--backend NAME] [--precision f32|bf16|auto] [--json FILE]\n"
    "IMAGE is a binary PPM or PGM file. --longest-side 0 is no limit.\n";

std::string quoted(const std::string& text) {
  std::string out = "\"";
  for (const char c : text) {
    if (c == '"' || c == '\\') {
      out += std::string("\\") + c;
    } else if (static_cast<unsigned char>(c) < 32) {
      char code[8];
      std::snprintf(code, sizeof code, "\\u%04x", c);
      out += code;
    } else {
      out += c;
    }
  }
  return out + "\"";
}

std::string line_of(const std::string& source, const Picture& picture, const std::vector<glip::Detection>& found) {
  std::ostringstream out;
  out.precision(std::numeric_limits<float>::max_digits10);
  out << "{\"source\": " << quoted(source) << ", \"frame\": 0, \"width\": " << picture.width
      << ", \"height\": " << picture.height << ", \"detections\": [";
  const char* between = "";
  for (const glip::Detection& one : found) {
    out << between << "{\"score\": " << one.score << ", \"label\": " << quoted(one.phrase) << ", \"box\": {\"xmin\": " << one.x1
        << ", \"ymin\": " << one.y1 << ", \"xmax\": " << one.x2 << ", \"ymax\": " << one.y2 << "}}";
    between = ", ";
  }
  out << "]}\n";
  return out.str();
}

template <typename Number>
Number number(const std::string& option, const std::string& text) {
  std::istringstream stream(text);
  Number value{};
  if (!(stream >> value) || !stream.eof()) throw std::invalid_argument(option + ": '" + text + "' is not a number");
  return value;
}

int run(const std::vector<std::string>& arguments) {
  std::vector<std::string> names;
  glip::Options options;
  float threshold = 0.5f;
  std::string json;
  for (std::size_t i = 0; i < arguments.size(); ++i) {
    const std::string& option = arguments[i];
    if (option.rfind("--", 0) != 0) {
      names.push_back(option);
      continue;
    }
    if (i + 1 == arguments.size()) throw std::invalid_argument(option + " needs a value");
    const std::string& value = arguments[++i];
    if (option == "--threshold") {
      threshold = number<float>(option, value);
    } else if (option == "--shortest-side") {
      options.shortest_side = number<int>(option, value);
    } else if (option == "--longest-side") {
      options.longest_side = number<int>(option, value);
    } else if (option == "--backend") {
      options.backend = value;
    } else if (option == "--precision") {
      options.precision = value;
    } else if (option == "--json") {
      json = value;
    } else {
      throw std::invalid_argument(option + " is unknown");
    }
  }
  if (names.size() != 3) throw std::invalid_argument("a bundle, a prompt and a picture are needed");

  const Picture picture = read_picture(names[2]);
  glip::Detector detector = glip::Detector::open(names[0], options);
  const glip::Prompt prompt = detector.encode(names[1]);
  glip::ImageView view;
  view.data = picture.pixels.data();
  view.width = picture.width;
  view.height = picture.height;
  view.format = picture.channels == 1 ? glip::PixelFormat::gray : glip::PixelFormat::rgb;
  const std::string line = line_of(names[2], picture, detector.detect(view, prompt, threshold));
  if (json.empty()) {
    std::cout << line;
  } else if (!(std::ofstream(json) << line)) {
    throw std::runtime_error(json + " cannot be written; choose another place");
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
