// From words to token ids and the tokens that score each class; the rules of glip_deploy/prompts.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "glip/glip.hpp"
#include "tokenizer.hpp"

namespace glip {

using Span = std::pair<std::size_t, std::size_t>;

/// A caption and where its classes are, in characters.
struct MarkedCaption {
  std::u32string caption;
  std::vector<std::u32string> phrases;
  std::vector<std::vector<Span>> spans;
};

MarkedCaption mark_names(const std::vector<std::string>& names);
MarkedCaption mark_caption(const std::string& text);
MarkedCaption mark_spans(const std::string& text, const std::vector<Phrase>& phrases);

/// A tokenized prompt.
struct TokenizedPrompt {
  std::vector<std::string> phrases;
  std::vector<std::int64_t> ids;
  std::vector<std::vector<std::size_t>> positions;  ///< of the tokens that score each class
};

TokenizedPrompt tokenize(const MarkedCaption& draft, const Tokenizer& tokenizer, std::size_t max_tokens);

/// Tokenize a list of names of any length: as many prompts as it needs, in the list's order, divided as in
/// glip_deploy/prompts/chunks.py. With `classes_per_prompt` above 0, so many classes in each, or fewer where they do not fit.
std::vector<TokenizedPrompt> tokenize_names(const std::vector<std::string>& names, const Tokenizer& tokenizer,
                                            std::size_t max_tokens, std::size_t classes_per_prompt);

/// Rows of (classes, tokens): row c averages the tokens of class c.
std::vector<float> class_map(const TokenizedPrompt& prompt);

namespace detail {

/// What a frame needs of one prompt of at most max_tokens.
struct PromptChunk {
  TokenizedPrompt tokenized;
  std::shared_ptr<const std::vector<float>> embedding;  ///< (tokens, width)
  std::vector<float> class_map;
};

/// What a frame needs of a prompt: one chunk, or those of a long list of names, whose labels follow each other.
struct PromptData {
  std::vector<PromptChunk> chunks;
  std::vector<std::string> phrases;  ///< of all chunks
  std::string bundle_key;
};

}  // namespace detail
}  // namespace glip
