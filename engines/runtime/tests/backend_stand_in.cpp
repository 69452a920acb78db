// A backend that computes nothing: what the sanitizers run the library with, as libraries of inference engines are not
// built for them. Its answers depend on the picture and the prompt alone.

#include <numeric>

#include "backend.hpp"

namespace glip {
namespace {

class StandIn : public Backend {
 public:
  explicit StandIn(std::size_t width) : width_(width) {}

  std::vector<float> encode_text(const std::vector<std::int64_t>& ids) override {
    std::vector<float> out(ids.size() * width_);
    for (std::size_t i = 0; i < out.size(); ++i) out[i] = static_cast<float>(ids[i / width_] % 97);
    return out;
  }

  std::vector<std::vector<Candidates>> detect(const Canvas& canvas, const std::vector<PromptInput>& prompts) override {
    const std::size_t pictures = canvas.pictures.size(), bytes = canvas.pixels.size() / pictures;
    std::vector<std::vector<Candidates>> out(prompts.size());
    for (std::size_t i = 0; i < prompts.size(); ++i) {
      const PromptInput& prompt = prompts[i];
      const float text = std::accumulate(prompt.embedding.begin(), prompt.embedding.end(), 0.0f) +
                         std::accumulate(prompt.class_map.begin(), prompt.class_map.end(), 0.0f);
      for (std::size_t picture = 0; picture < pictures; ++picture) {
        std::uint64_t pixels = 0;
        for (std::size_t at = 0; at < bytes; ++at) pixels += canvas.pixels[picture * bytes + at];
        scratch_.assign(64, text + static_cast<float>(pixels % 1000));  // what two threads must not share
        Candidates found;
        for (std::size_t slot = 0; slot < scratch_.size(); ++slot) {
          const auto part = static_cast<float>(static_cast<std::size_t>(scratch_[slot]) * (slot + 7) % 101);
          found.boxes.insert(found.boxes.end(), {part, part / 2, part + 9, part + 5});
          found.scores.push_back(part / 101);
          found.labels.push_back(static_cast<std::int64_t>(slot % prompt.classes));
        }
        out[i].push_back(std::move(found));
      }
    }
    return out;
  }

  std::unique_ptr<Backend> clone() const override { return std::make_unique<StandIn>(width_); }
  std::string text_key() const override { return "stand-in"; }

 private:
  std::size_t width_;
  std::vector<float> scratch_;
};

}  // namespace
}  // namespace glip

extern "C" __attribute__((visibility("default"))) glip::Backend* glip_open_backend(const glip::Bundle& bundle,
                                                                                   const glip::BackendOptions&) {
  return new glip::StandIn(bundle.width);
}
