// SHA-256 (FIPS 180-4).
#pragma once

#include <array>
#include <cstdint>
#include <string>

namespace glip {

class Sha256 {
 public:
  void update(const void* data, std::size_t size);
  std::array<std::uint8_t, 32> digest();

 private:
  void block(const std::uint8_t* bytes);
  std::array<std::uint32_t, 8> state_{0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a,
                                      0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};
  std::array<std::uint8_t, 64> rest_{};
  std::uint64_t total_ = 0;
};

std::string sha256_hex(const std::string& data);
std::string sha256_raw(const std::string& data);
/// Of a file; empty where it cannot be read.
std::string sha256_of_file(const std::string& path);

}  // namespace glip
