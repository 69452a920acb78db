// What the example programs share: options, and the JSON line of glip-detect.
#pragma once

#include <cstdio>
#include <limits>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "glip/glip.hpp"

/// The value of an option as a number; throws std::invalid_argument where it is none.
template <typename Number>
Number number(const std::string& option, const std::string& text) {
  std::istringstream stream(text);
  Number value{};
  if (!(stream >> value) || !stream.eof()) throw std::invalid_argument(option + ": '" + text + "' is not a number");
  return value;
}

/// What all programs take: BUNDLE, PROMPT and a picture or a video, and how to detect in it.
struct Arguments {
  std::vector<std::string> names;
  glip::Options options;
  float threshold = 0.5f;
  std::string json;

  /// Take an option; false where it is none of these.
  bool take(const std::string& option, const std::string& value) {
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
      return false;
    }
    return true;
  }

  /// Read a command line; `other` takes the options that only one program has, and says whether it did.
  template <typename Other>
  void parse(const std::vector<std::string>& given, const std::string& what, Other other) {
    for (std::size_t i = 0; i < given.size(); ++i) {
      const std::string& option = given[i];
      if (option.rfind("--", 0) != 0) {
        names.push_back(option);
        continue;
      }
      if (i + 1 == given.size()) throw std::invalid_argument(option + " needs a value");
      const std::string& value = given[++i];
      if (!take(option, value) && !other(option, value)) throw std::invalid_argument(option + " is unknown");
    }
    if (names.size() != 3) throw std::invalid_argument("a bundle, a prompt and " + what + " are needed");
  }
};

inline std::string quoted(const std::string& text) {
  std::string out = "\"";
  for (const char c : text) {
    if (c == '"' || c == '\\') {
      out += std::string("\\") + c;
    } else if (static_cast<unsigned char>(c) < 32) {
      char code[8];
      std::snprintf(code, sizeof code, "\\u%04x", static_cast<unsigned>(c));
      out += code;
    } else {
      out += c;
    }
  }
  return out + "\"";
}

/// The line that glip-detect writes of a frame.
inline std::string line_of(const std::string& source, long frame, int width, int height,
                           const std::vector<glip::Detection>& found) {
  std::ostringstream out;
  out.precision(std::numeric_limits<float>::max_digits10);
  out << "{\"source\": " << quoted(source) << ", \"frame\": " << frame << ", \"width\": " << width << ", \"height\": " << height
      << ", \"detections\": [";
  const char* between = "";
  for (const glip::Detection& one : found) {
    out << between << "{\"score\": " << one.score << ", \"label\": " << quoted(one.phrase) << ", \"box\": {\"xmin\": " << one.x1
        << ", \"ymin\": " << one.y1 << ", \"xmax\": " << one.x2 << ", \"ymax\": " << one.y2 << "}}";
    between = ", ";
  }
  out << "]}\n";
  return out.str();
}
