// A picture file for the examples: binary PPM or PGM (P6, P5), which every converter writes.
#pragma once

#include <fstream>
#include <stdexcept>
#include <string>
#include <vector>

struct Picture {
  int width = 0, height = 0, channels = 0;  // 3: red, green, blue; 1: gray
  std::vector<unsigned char> pixels;
};

inline Picture read_picture(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  const auto number = [&file] {
    int value = -1;
    while (file >> std::ws && file.peek() == '#') file.ignore(1 << 16, '\n');
    file >> value;
    return value;
  };
  std::string kind;
  file >> kind;
  Picture out;
  out.channels = kind == "P6" ? 3 : kind == "P5" ? 1 : 0;
  out.width = number();
  out.height = number();
  const int most = number();
  file.get();
  if (!file || out.channels == 0 || out.width < 1 || out.height < 1 || out.width > 30000 || out.height > 30000 || most != 255) {
    throw std::runtime_error("picture " + path + " is not an 8-bit PPM or PGM; convert it, for instance with ImageMagick");
  }
  out.pixels.resize(static_cast<std::size_t>(out.width) * static_cast<std::size_t>(out.height) *
                    static_cast<std::size_t>(out.channels));
  if (!file.read(reinterpret_cast<char*>(out.pixels.data()), static_cast<std::streamsize>(out.pixels.size()))) {
    throw std::runtime_error("picture " + path + " ends too early; write it again");
  }
  return out;
}
