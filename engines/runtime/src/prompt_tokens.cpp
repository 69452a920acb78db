#include <algorithm>
#include <set>

#include "prompt.hpp"
#include "text.hpp"

namespace glip {
namespace {

constexpr std::size_t kNone = static_cast<std::size_t>(-1);

std::size_t first_token(const std::vector<std::size_t>& tokens, std::size_t from, int step) {
  for (int tried = 0; tried < 3; ++tried, from += static_cast<std::size_t>(step)) {
    if (from < tokens.size() && tokens[from] != kNone) return tokens[from];  // below 0 wraps around, beyond the end
  }
  return kNone;
}

}  // namespace

TokenizedPrompt tokenize(const MarkedCaption& draft, const Tokenizer& tokenizer, std::size_t max_tokens) {
  const Encoding encoding = tokenizer.encode(draft.caption);
  std::vector<std::size_t> tokens(draft.caption.size(), kNone);
  for (std::size_t token = 0; token < encoding.offsets.size(); ++token) {
    for (std::size_t c = encoding.offsets[token].first; c < encoding.offsets[token].second; ++c) tokens[c] = token;
  }
  TokenizedPrompt out;
  out.ids = encoding.ids;
  for (std::size_t index = 0; index < draft.phrases.size(); ++index) {
    std::set<std::size_t> positions;
    for (const auto& [start, end] : draft.spans[index]) {
      const std::size_t first = first_token(tokens, start, 1), last = first_token(tokens, end - 1, -1);
      if (first == kNone || last == kNone) continue;
      for (std::size_t at = first; at <= last; ++at) positions.insert(at);
    }
    if (positions.empty()) {
      throw Error(ErrorKind::prompt, "class " + std::to_string(index) + " (" + shown(draft.phrases[index]) +
                                         ") has no character that the tokenizer knows, so it could never be detected;"
                                         " remove it or use other words");
    }
    out.positions.emplace_back(positions.begin(), positions.end());
    out.phrases.push_back(encode(draft.phrases[index]));
  }
  if (out.ids.size() > max_tokens) {
    std::string where = "only words after the last class reach beyond";
    for (std::size_t index = 0; index < out.positions.size(); ++index) {
      if (out.positions[index].back() + 1 >= max_tokens) {
        where =
            "the first class that reaches beyond is " + shown(draft.phrases[index]) + " (index " + std::to_string(index) + ")";
        break;
      }
    }
    throw Error(ErrorKind::prompt, "the prompt has " + std::to_string(out.ids.size()) +
                                       " tokens with [CLS] and [SEP], the limit is " + std::to_string(max_tokens) + "; " +
                                       where + "; name fewer classes, or split them over several prompts");
  }
  return out;
}

std::vector<float> class_map(const TokenizedPrompt& prompt) {
  std::vector<float> out(prompt.phrases.size() * prompt.ids.size(), 0.0f);
  for (std::size_t row = 0; row < prompt.positions.size(); ++row) {
    for (const std::size_t at : prompt.positions[row]) {
      out[row * prompt.ids.size() + at] = static_cast<float>(1.0 / static_cast<double>(prompt.positions[row].size()));
    }
  }
  return out;
}

}  // namespace glip
