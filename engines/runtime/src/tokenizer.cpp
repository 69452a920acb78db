#include "tokenizer.hpp"

#include <utf8proc.h>

#include <algorithm>
#include <nlohmann/json.hpp>

#include "glip/glip.hpp"
#include "text.hpp"

namespace glip {
namespace {

struct Range {
  char32_t first, last;
};
struct Pair {
  char32_t from, to;
};
#include "unicode_exceptions.inc"

template <std::size_t N>
bool within(const Range (&ranges)[N], char32_t c) {
  return std::any_of(std::begin(ranges), std::end(ranges), [c](const Range& r) { return r.first <= c && c <= r.last; });
}

utf8proc_category_t category(char32_t c) { return utf8proc_category(static_cast<utf8proc_int32_t>(c)); }

// The white space of Unicode, which Python's isspace has and four control characters more.
bool is_white(char32_t c) { return is_space(c) && !(c >= 28 && c <= 31) && c != 0x85 && c != 11 && c != 12; }

bool is_chinese(char32_t c) {
  static constexpr Range kBlocks[] = {{0x4E00, 0x9FFF},   {0x3400, 0x4DBF},   {0x20000, 0x2A6DF}, {0x2A700, 0x2B73F},
                                      {0x2B740, 0x2B81F}, {0x2B920, 0x2CEAF}, {0xF900, 0xFAFF},   {0x2F800, 0x2FA1F}};
  return within(kBlocks, c);
}

bool is_punctuation(char32_t c) {
  const bool ascii = (c >= 33 && c <= 47) || (c >= 58 && c <= 64) || (c >= 91 && c <= 96) || (c >= 123 && c <= 126);
  const auto kind = category(c);
  const bool punctuation = kind >= UTF8PROC_CATEGORY_PC && kind <= UTF8PROC_CATEGORY_PO;
  return ascii || punctuation != (c >= 128 && within(kPunctuationDiffers, c));
}

/// BERT's normalization of one character: control characters and accents go, white space becomes a space, Chinese
/// characters stand alone, and all is lower case.
void normalize(char32_t c, std::u32string& out) {
  out.clear();
  if (c < 128) {
    if (c == 9 || c == 10 || c == 13) {
      out.push_back(U' ');
    } else if (c >= 32 && c != 127) {
      out.push_back(c >= U'A' && c <= U'Z' ? c + 32 : c);
    }
    return;
  }
  const auto kind = category(c);
  if (c == 0xFFFD || kind == UTF8PROC_CATEGORY_CC || kind == UTF8PROC_CATEGORY_CO || within(kRemoved, c)) return;
  if (within(kKept, c)) {
    out.push_back(c);
    return;
  }
  if (kind == UTF8PROC_CATEGORY_CF) return;
  if (is_white(c)) {
    out.push_back(U' ');
    return;
  }
  for (const Pair& pair : kLower) {
    if (pair.from == c) {
      out.push_back(pair.to);
      return;
    }
  }
  utf8proc_int32_t parts[32];
  int boundary = 0;
  const auto count = utf8proc_decompose_char(static_cast<utf8proc_int32_t>(c), parts, 32,
                                             static_cast<utf8proc_option_t>(UTF8PROC_DECOMPOSE | UTF8PROC_STABLE), &boundary);
  const bool alone = is_chinese(c);
  if (alone) out.push_back(U' ');
  for (utf8proc_ssize_t i = 0; i < count && i < 32; ++i) {
    if (utf8proc_category(parts[i]) != UTF8PROC_CATEGORY_MN) {
      out.push_back(static_cast<char32_t>(utf8proc_tolower(parts[i])));
    }
  }
  if (alone) out.push_back(U' ');
}

}  // namespace

Tokenizer Tokenizer::parse(const std::string& json, const std::string& file) {
  Tokenizer out;
  try {
    const auto content = nlohmann::json::parse(json);
    const auto& model = content.at("model");
    const auto& normalizer = content.at("normalizer");
    if (model.at("type") != "WordPiece" || normalizer.at("type") != "BertNormalizer" ||
        content.at("pre_tokenizer").at("type") != "BertPreTokenizer" || !normalizer.at("lowercase").get<bool>() ||
        model.at("continuing_subword_prefix") != "##") {
      throw Error(ErrorKind::bundle, file + " is not BERT's uncased tokenizer; export the bundle again with glip-export");
    }
    for (const auto& [token, id] : model.at("vocab").items()) {
      out.vocabulary_.emplace(token, id.get<std::int64_t>());
      out.longest_entry_ = std::max(out.longest_entry_, token.size());
    }
    for (const auto& added : content.at("added_tokens")) {
      out.special_.emplace_back(decode(added.at("content").get<std::string>()), added.at("id").get<std::int64_t>());
    }
    out.longest_word_ = model.at("max_input_chars_per_word").get<std::size_t>();
    out.unknown_ = out.vocabulary_.at(model.at("unk_token").get<std::string>());
    out.begin_ = out.vocabulary_.at("[CLS]");
    out.end_ = out.vocabulary_.at("[SEP]");
  } catch (const Error&) {
    throw;
  } catch (const std::exception&) {
    throw Error(ErrorKind::bundle, file + " is not a tokenizer; export the bundle again with glip-export");
  }
  return out;
}

Encoding Tokenizer::encode(std::u32string_view text) const {
  Encoding out{{begin_}, {{0, 0}}};
  std::size_t begin = 0;
  for (std::size_t i = 0; i < text.size();) {
    const std::pair<std::u32string, std::int64_t>* found = nullptr;
    for (const auto& token : special_) {
      if (text.substr(i, token.first.size()) == token.first && (!found || token.first.size() > found->first.size())) {
        found = &token;
      }
    }
    if (!found || found->first.empty()) {
      ++i;
      continue;
    }
    words(text, begin, i, out);
    out.ids.push_back(found->second);
    out.offsets.emplace_back(i, i + found->first.size());
    begin = i += found->first.size();
  }
  words(text, begin, text.size(), out);
  out.ids.push_back(end_);
  out.offsets.emplace_back(0, 0);
  return out;
}

void Tokenizer::words(std::u32string_view text, std::size_t begin, std::size_t end, Encoding& out) const {
  std::vector<Piece> pieces;
  std::u32string normal;
  const auto flush = [&] {
    if (!pieces.empty()) word(pieces, out);
    pieces.clear();
  };
  for (std::size_t i = begin; i < end; ++i) {
    normalize(text[i], normal);
    for (const char32_t c : normal) {
      if (is_white(c)) {
        flush();
      } else if (is_punctuation(c)) {
        flush();
        pieces.push_back({c, i});
        flush();
      } else {
        pieces.push_back({c, i});
      }
    }
  }
  flush();
}

void Tokenizer::word(const std::vector<Piece>& pieces, Encoding& out) const {
  const std::pair<std::size_t, std::size_t> whole{pieces.front().from, pieces.back().from + 1};
  const std::size_t before = out.ids.size();
  bool known = pieces.size() <= longest_word_;
  for (std::size_t start = 0; known && start < pieces.size();) {
    std::string candidate = start ? "##" : "";
    std::size_t matched = 0;
    std::int64_t id = 0;
    for (std::size_t stop = start; stop < pieces.size(); ++stop) {
      candidate += glip::encode(std::u32string_view(&pieces[stop].c, 1));
      if (candidate.size() > longest_entry_) break;
      const auto entry = vocabulary_.find(candidate);
      if (entry != vocabulary_.end()) {
        matched = stop + 1;
        id = entry->second;
      }
    }
    known = matched > 0;
    if (known) {
      out.ids.push_back(id);
      out.offsets.emplace_back(pieces[start].from, pieces[matched - 1].from + 1);
      start = matched;
    }
  }
  if (!known) {
    out.ids.resize(before);
    out.offsets.resize(before);
    out.ids.push_back(unknown_);
    out.offsets.push_back(whole);
  }
}

}  // namespace glip
