// Unicode text as Python's str sees it.
#pragma once

#include <string>
#include <string_view>

namespace glip {

/// Decode UTF-8; throws Error(prompt) where it is not UTF-8.
std::u32string decode(std::string_view utf8);
std::string encode(std::u32string_view text);

/// Python's str.isspace, of one character.
bool is_space(char32_t c);
/// What \w matches in Python's re.
bool is_word(char32_t c);
/// " ".join(text.split())
std::u32string single_spaced(std::u32string_view text);
/// A name for comparison: upper and lower case, white space and underscores do not count.
std::u32string fold(std::u32string_view text);
/// A text for a message, quoted, at most 60 characters of it.
std::string shown(std::u32string_view text);

}  // namespace glip
