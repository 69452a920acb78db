#include <algorithm>

#include "prompt.hpp"
#include "text.hpp"

namespace glip {
namespace {

// As in glip_deploy/prompts/chunks.py, which says why: chunks that Python makes are cached for both.
constexpr double kFill = 0.85;
constexpr std::size_t kStep = 8;

/// Tokens of each class, those of the words around a bracketed name among them.
std::vector<std::size_t> token_counts(const std::vector<std::string>& names, const Tokenizer& tokenizer, std::size_t room) {
  std::vector<std::size_t> counts;
  for (std::size_t index = 0; index < names.size(); ++index) {
    // A dot between two classes is a token of its own, so tokens of a caption are those of its parts.
    const MarkedCaption alone = mark_names({names[index]});
    const std::size_t count = tokenizer.encode(alone.caption).ids.size() - 2;  // without [CLS] and [SEP]
    const auto what = [&] { return "class " + std::to_string(index) + " (" + shown(alone.phrases.front()) + ")"; };
    if (count > room) {
      throw Error(ErrorKind::prompt, what() + " has " + std::to_string(count) + " tokens by itself, a prompt has room for " +
                                         std::to_string(room) + "; shorten it");
    }
    if (count == 0) {
      throw Error(ErrorKind::prompt, what() +
                                         " has no character that the tokenizer knows, so it could never be detected;"
                                         " remove it or use other words");
    }
    counts.push_back(count);
  }
  return counts;
}

/// The first class of each chunk and the one after its last.
std::vector<Span> chunks_of(const std::vector<std::size_t>& counts, std::size_t room, std::size_t classes) {
  std::vector<std::size_t> total{0};
  for (const std::size_t count : counts) total.push_back(total.back() + count + 1);  // with the dot that follows
  const auto fits = [&](std::size_t start, std::size_t end) { return total[end] - total[start] - 1 <= room; };
  if (classes == 0) {
    if (fits(0, counts.size())) return {{0, counts.size()}};
    const double average = kFill * static_cast<double>(room) * static_cast<double>(counts.size());
    classes = std::max<std::size_t>(1, static_cast<std::size_t>(average / static_cast<double>(total.back())));
    if (classes > kStep) classes -= classes % kStep;
  }
  std::vector<Span> out;
  for (std::size_t start = 0; start < counts.size();) {
    const std::size_t stop = start + std::min(classes, counts.size() - start);
    std::vector<Span> waiting{{start, stop}};
    while (!waiting.empty()) {
      const auto [first, end] = waiting.back();
      waiting.pop_back();
      if (fits(first, end)) {
        out.emplace_back(first, end);
      } else {
        const std::size_t middle = (first + end + 1) / 2;
        waiting.emplace_back(middle, end);
        waiting.emplace_back(first, middle);
      }
    }
    start = stop;
  }
  return out;
}

}  // namespace

std::vector<TokenizedPrompt> tokenize_names(const std::vector<std::string>& names, const Tokenizer& tokenizer,
                                            std::size_t max_tokens, std::size_t classes_per_prompt) {
  mark_names(names);  // finds repeated, empty and malformed names by their place in the whole list
  const std::size_t room = max_tokens > 2 ? max_tokens - 2 : 0;
  std::vector<TokenizedPrompt> out;
  for (const auto& [first, end] : chunks_of(token_counts(names, tokenizer, room), room, classes_per_prompt)) {
    const std::vector<std::string> chunk(names.begin() + static_cast<std::ptrdiff_t>(first),
                                         names.begin() + static_cast<std::ptrdiff_t>(end));
    out.push_back(tokenize(mark_names(chunk), tokenizer, max_tokens));
  }
  return out;
}

}  // namespace glip
