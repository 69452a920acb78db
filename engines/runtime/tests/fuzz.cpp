// Inputs that nobody made: manifests, tokenizers and prompts. The first byte says which, the rest is the content. Whatever
// it is, the answer is a result that holds together, or a glip::Error of one line. fuzz_driver.cpp makes the inputs.

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <sstream>

#include "bundle.hpp"
#include "prompt.hpp"
#include "text.hpp"

namespace {

void demand(bool truth, const char* what) {
  if (truth) return;
  std::fprintf(stderr, "fuzz: %s\n", what);
  std::abort();
}

/// BERT's tokenizer in the file that $GLIP_FUZZ_TOKENIZER names.
const glip::Tokenizer& tokenizer() {
  static const glip::Tokenizer* const known = [] {
    const char* file = std::getenv("GLIP_FUZZ_TOKENIZER");
    demand(file, "set GLIP_FUZZ_TOKENIZER to a tokenizer.json");
    return new glip::Tokenizer(glip::Tokenizer::parse(glip::read_file(file), file));
  }();
  return *known;
}

void check(const glip::Encoding& encoding, std::size_t length) {
  demand(encoding.ids.size() == encoding.offsets.size() && encoding.ids.size() >= 2, "ids and offsets do not match");
  for (const auto& [start, end] : encoding.offsets) demand(start <= end && end <= length, "an offset is outside of the text");
}

void check(const glip::TokenizedPrompt& prompt, std::size_t limit) {
  demand(prompt.ids.size() <= limit, "more tokens than the limit");
  demand(!prompt.phrases.empty() && prompt.phrases.size() == prompt.positions.size(), "phrases and positions do not match");
  for (const auto& positions : prompt.positions) {
    demand(!positions.empty() && positions.back() < prompt.ids.size(), "a position is outside of the tokens");
  }
  demand(glip::class_map(prompt).size() == prompt.phrases.size() * prompt.ids.size(), "the class map has another size");
}

std::vector<std::string> lines(const std::string& text) {
  std::vector<std::string> out;
  std::istringstream stream(text);
  for (std::string line; std::getline(stream, line);) out.push_back(line);
  return out;
}

void run(int kind, const std::string& text) {
  switch (kind) {
    case 0: {
      glip::Bundle bundle;
      const auto sizes = glip::parse_manifest(text, "manifest.json", bundle);
      demand(sizes.size() == bundle.hashes.size(), "files without a size");
      return;
    }
    case 1: {
      const std::u32string words = U"a Caf\u00e9, [MASK] 3.5 \u4f60\u597d unaffable";
      check(glip::Tokenizer::parse(text, "tokenizer.json").encode(words), words.size());
      return;
    }
    case 2: {
      const std::u32string words = glip::decode(text);
      check(tokenizer().encode(words), words.size());
      demand(glip::encode(words) == text, "decoding and encoding change a text");
      return;
    }
    case 3:
      return check(glip::tokenize(glip::mark_caption(text), tokenizer(), 256), 256);
    case 4: {
      const auto names = lines(text);
      std::size_t classes = 0;
      for (const auto& prompt : glip::tokenize_names(names, tokenizer(), 24, names.size() % 5)) {
        check(prompt, 24);
        classes += prompt.phrases.size();
      }
      demand(classes == names.size(), "chunks lose classes");
      return;
    }
    default: {  // a caption, and a line for each piece: the phrase it belongs to, from, to
      std::istringstream stream(text);
      std::string caption;
      std::getline(stream, caption);
      std::vector<glip::Phrase> phrases;
      std::size_t phrase = 0, start = 0, end = 0;
      while (stream >> phrase >> start >> end && phrases.size() < 99) {
        if (phrases.empty() || phrase % 2) phrases.emplace_back();
        phrases.back().spans.emplace_back(start, end);
      }
      return check(glip::tokenize(glip::mark_spans(caption, phrases), tokenizer(), 256), 256);
    }
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  if (size == 0) return 0;
  try {
    run(data[0] % 6, std::string(reinterpret_cast<const char*>(data) + 1, size - 1));
  } catch (const glip::Error& error) {
    const std::string message = error.what();
    demand(!message.empty() && message.find('\n') == std::string::npos, "a message is not one line");
    demand(message.size() < 1000, "a message is too long");
  }
  return 0;
}
