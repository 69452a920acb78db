// Answers the tests' questions about the parts of the library: a JSON object a line in, one out.

#include <exception>
#include <iostream>
#include <nlohmann/json.hpp>

#include "bundle.hpp"
#include "cache.hpp"
#include "frames.hpp"
#include "prompt.hpp"
#include "select.hpp"
#include "text.hpp"

using nlohmann::json;

namespace {

json tokens(const glip::TokenizedPrompt& prompt) {
  return {{"ids", prompt.ids}, {"phrases", prompt.phrases}, {"positions", prompt.positions}};
}

json answer(const json& question, const glip::Tokenizer& tokenizer) {
  const std::string what = question.at("what");
  if (what == "tokenize") {
    const auto found = tokenizer.encode(glip::decode(question.at("text").get<std::string>()));
    return {{"ids", found.ids}, {"offsets", found.offsets}};
  }
  if (what == "chunks") {
    json out = json::array();
    for (const auto& prompt :
         tokenize_names(question.at("names").get<std::vector<std::string>>(), tokenizer,
                        question.value("limit", std::size_t{256}), question.value("classes", std::size_t{0}))) {
      out.push_back(tokens(prompt));
    }
    return out;
  }
  if (what == "prompt") {
    const auto limit = question.value("limit", std::size_t{256});
    if (question.contains("names")) {
      return tokens(tokenize(glip::mark_names(question.at("names").get<std::vector<std::string>>()), tokenizer, limit));
    }
    const std::string text = question.at("text");
    if (!question.contains("spans")) return tokens(tokenize(glip::mark_caption(text), tokenizer, limit));
    std::vector<glip::Phrase> phrases;
    for (const auto& spans : question.at("spans")) {
      phrases.push_back({spans.get<std::vector<std::pair<std::size_t, std::size_t>>>(), ""});
    }
    return tokens(tokenize(glip::mark_spans(text, phrases), tokenizer, limit));
  }
  if (what == "canvas") {
    const auto bytes = question.at("pixels").get<std::vector<std::uint8_t>>();
    glip::ImageView view;
    view.data = bytes.data();
    view.width = question.at("width");
    view.height = question.at("height");
    view.pitch = question.value("pitch", std::size_t{0});
    view.format = static_cast<glip::PixelFormat>(question.at("format").get<int>());
    view.memory = static_cast<glip::Memory>(question.value("memory", 0));
    if (question.value("null", false)) view.data = nullptr;
    glip::Canvas canvas;
    glip::make_canvas({view}, question.at("shortest"), question.at("longest"), canvas);
    return {{"pixels", canvas.pixels},
            {"canvas", {canvas.canvas.height, canvas.canvas.width}},
            {"picture", {canvas.pictures[0].height, canvas.pictures[0].width}}};
  }
  if (what == "size") {
    const auto size =
        glip::network_size(question.at("height"), question.at("width"), question.at("shortest"), question.at("longest"));
    return {size.height, size.width};
  }
  if (what == "cache") {  // as many prompts as are put, in memory; which of those asked for are known, in this order
    glip::PromptCache cache("", "");
    json known = json::array();
    for (const auto& [action, id] : question.at("steps").get<std::vector<std::pair<std::string, std::int64_t>>>()) {
      if (action == "put") cache.put({id}, 1, std::make_shared<const std::vector<float>>(1, 0.0f));
      if (action == "get") known.push_back(cache.get({id}, 1) != nullptr);
    }
    return known;
  }
  const glip::Candidates found{question.at("boxes").get<std::vector<float>>(), question.at("scores").get<std::vector<float>>(),
                               question.at("labels").get<std::vector<std::int64_t>>()};
  json out = json::array();
  for (const auto& one : glip::select(found, question.at("thresholds").get<std::vector<float>>(),
                                      question.at("phrases").get<std::vector<std::string>>(), {100, 200}, {333, 777}, 0.6,
                                      question.at("most").get<std::size_t>())) {
    out.push_back({one.x1, one.y1, one.x2, one.y2, one.score, one.label});
  }
  return out;
}

}  // namespace

int main(int, char** arguments) try {
  const glip::Tokenizer tokenizer = glip::Tokenizer::parse(glip::read_file(arguments[1]), arguments[1]);
  for (std::string line; std::getline(std::cin, line);) {
    json out;
    try {
      out = answer(json::parse(line), tokenizer);
    } catch (const glip::Error& error) {
      out = {{"error", error.what()}, {"kind", static_cast<int>(error.kind())}};
    }
    std::cout << out.dump() << "\n";
  }
} catch (const std::exception& error) {
  std::cerr << error.what() << "\n";
  return 1;
}
