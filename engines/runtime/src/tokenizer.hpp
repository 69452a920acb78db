// BERT's WordPiece tokenizer, as the bundle's tokenizer.json describes it.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

namespace glip {

/// Token ids, [CLS] to [SEP], and for each the half-open range of characters of the text it came from.
struct Encoding {
  std::vector<std::int64_t> ids;
  std::vector<std::pair<std::size_t, std::size_t>> offsets;
};

class Tokenizer {
 public:
  /// Parse a tokenizer.json; throws Error(bundle) where it is none, or of another kind than BERT's.
  static Tokenizer parse(const std::string& json, const std::string& file);

  Encoding encode(std::u32string_view text) const;
  std::int64_t unknown() const { return unknown_; }

 private:
  struct Piece {
    char32_t c;
    std::size_t from;  // index in the text
  };
  void words(std::u32string_view text, std::size_t begin, std::size_t end, Encoding& out) const;
  void word(const std::vector<Piece>& pieces, Encoding& out) const;

  std::unordered_map<std::string, std::int64_t> vocabulary_;
  std::vector<std::pair<std::u32string, std::int64_t>> special_;
  std::int64_t unknown_ = 0, begin_ = 0, end_ = 0;
  std::size_t longest_word_ = 100, longest_entry_ = 0;
};

}  // namespace glip
