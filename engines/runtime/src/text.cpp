#include "text.hpp"

#include <utf8proc.h>

#include "glip/glip.hpp"

namespace glip {

std::u32string decode(std::string_view utf8) {
  std::u32string out;
  out.reserve(utf8.size());
  const auto* bytes = reinterpret_cast<const utf8proc_uint8_t*>(utf8.data());
  auto left = static_cast<utf8proc_ssize_t>(utf8.size());
  while (left > 0) {
    utf8proc_int32_t c = 0;
    const utf8proc_ssize_t used = utf8proc_iterate(bytes, left, &c);
    if (used <= 0) {
      throw Error(ErrorKind::prompt, "the prompt is not UTF-8 (byte " +
                                         std::to_string(utf8.size() - static_cast<std::size_t>(left)) + "); write it in UTF-8");
    }
    out.push_back(static_cast<char32_t>(c));
    bytes += used;
    left -= used;
  }
  return out;
}

std::string encode(std::u32string_view text) {
  std::string out;
  for (const char32_t c : text) {
    utf8proc_uint8_t bytes[4];
    const auto count = utf8proc_encode_char(static_cast<utf8proc_int32_t>(c), bytes);
    out.append(reinterpret_cast<const char*>(bytes), static_cast<std::size_t>(count));
  }
  return out;
}

bool is_space(char32_t c) {
  return (c >= 9 && c <= 13) || (c >= 28 && c <= 32) || c == 0x85 || c == 0xA0 || c == 0x1680 || (c >= 0x2000 && c <= 0x200A) ||
         c == 0x2028 || c == 0x2029 || c == 0x202F || c == 0x205F || c == 0x3000;
}

bool is_word(char32_t c) {
  if (c == U'_') return true;
  const utf8proc_category_t category = utf8proc_category(static_cast<utf8proc_int32_t>(c));
  return (category >= UTF8PROC_CATEGORY_LU && category <= UTF8PROC_CATEGORY_LO) ||
         (category >= UTF8PROC_CATEGORY_ND && category <= UTF8PROC_CATEGORY_NO);
}

std::u32string single_spaced(std::u32string_view text) {
  std::u32string out;
  bool gap = false;
  for (const char32_t c : text) {
    if (is_space(c)) {
      gap = !out.empty();
      continue;
    }
    if (gap) out.push_back(U' ');
    gap = false;
    out.push_back(c);
  }
  return out;
}

std::u32string fold(std::u32string_view text) {
  std::u32string out;
  for (const char32_t c : text) {
    utf8proc_int32_t folded[8];
    int boundary = 0;
    const auto count =
        utf8proc_decompose_char(c == U'_' ? ' ' : static_cast<utf8proc_int32_t>(c), folded, 8, UTF8PROC_CASEFOLD, &boundary);
    for (utf8proc_ssize_t i = 0; i < count && i < 8; ++i) out.push_back(static_cast<char32_t>(folded[i]));
  }
  return single_spaced(out);
}

std::string shown(std::u32string_view text) {
  std::u32string out;
  for (const char32_t c : text.substr(0, text.size() <= 60 ? 60 : 57)) out.push_back(c < 32 || c == 127 ? U' ' : c);
  return "'" + encode(out) + (text.size() <= 60 ? "" : "...") + "'";
}

}  // namespace glip
