#include <atomic>
#include <mutex>

#include "backend.hpp"
#include "cache.hpp"
#include "glip/glip.hpp"
#include "guard.hpp"
#include "prompt.hpp"
#include "sha256.hpp"

namespace glip {
namespace detail {

/// What clones share.
struct Shared {
  Bundle bundle;
  Tokenizer tokenizer;
  Options options;
  std::string key;      ///< of the embeddings
  bool on_gpu = false;  ///< whether pictures of the host are resized there
  std::unique_ptr<PromptCache> prompts;
};

struct DetectorState {
  std::shared_ptr<Shared> shared;
  std::unique_ptr<Backend> backend;
  Canvas canvas;  // its memory is used again by the next frame
  std::mutex mutex;
  std::atomic<bool> closed{false};  // set while the mutex is held
};

}  // namespace detail

namespace {

void check(const Options& options) {
  const auto within = [](const char* name, int value, int least, int most, const char* what) {
    if (value < least || value > most) {
      throw Error(ErrorKind::option, std::string(name) + " is " + std::to_string(value) + "; legal is " +
                                         std::to_string(least) + " to " + std::to_string(most) + what);
    }
  };
  within("shortest_side", options.shortest_side, 1, 64'000'000, " pixels");
  within("longest_side", options.longest_side, 0, 64'000'000, " pixels, 0 for no limit");
  within("threads", options.threads, 0, 512, ", 0 for one a core");
  if (!options.resize.empty() && options.resize != "exact" && options.resize != "gpu") {
    throw Error(ErrorKind::option, "resize is \"" + options.resize + "\"; it must be \"exact\" or \"gpu\"");
  }
}

/// Whether pictures of the host are resized on the GPU: as asked, or where the backend can.
bool resizes_on_gpu(const std::string& asked, Backend& backend) {
  if (asked == "exact") return false;
  try {
    if (backend.prepare_resize()) return true;
  } catch (const Error& error) {
    if (!asked.empty() || error.kind() != ErrorKind::missing) throw;
    return false;
  }
  if (!asked.empty()) {
    throw Error(ErrorKind::option, "resize is \"gpu\", which only backend tensorrt does; use \"exact\"");
  }
  return false;
}

void check_open(const detail::DetectorState* state) {
  if (!state || state->closed) {
    throw Error(ErrorKind::closed, "this detector is closed; open it again with Detector::open");
  }
}

/// Hold a detector, which another thread may have closed while this one waited.
std::unique_lock<std::mutex> held(detail::DetectorState& state) {
  std::unique_lock<std::mutex> lock(state.mutex);
  check_open(&state);
  return lock;
}

const detail::PromptData& filled(const std::shared_ptr<const detail::PromptData>& data) {
  if (!data) throw Error(ErrorKind::prompt, "the prompt is empty; encode one with Detector::encode");
  return *data;
}

}  // namespace

const std::vector<std::string>& Prompt::phrases() const { return filled(data_).phrases; }
std::size_t Prompt::chunks() const { return filled(data_).chunks.size(); }
const std::vector<std::int64_t>& Prompt::tokens(std::size_t chunk) const {
  const auto& chunks = filled(data_).chunks;
  if (chunk >= chunks.size()) {
    throw Error(ErrorKind::option,
                "chunk " + std::to_string(chunk) + " does not exist; the prompt has " + std::to_string(chunks.size()));
  }
  return chunks[chunk].tokenized.ids;
}

Detector::Detector(std::unique_ptr<detail::DetectorState> state) : state_(std::move(state)) {}
Detector::Detector(Detector&&) noexcept = default;
Detector& Detector::operator=(Detector&&) noexcept = default;
Detector::~Detector() = default;

detail::DetectorState& Detector::state() const {
  check_open(state_.get());
  return *state_;
}

Detector Detector::open(const std::string& path, const Options& options) {
  return guarded([&] {
    check(options);
    auto state = std::make_unique<detail::DetectorState>();
    auto shared = std::make_shared<detail::Shared>();
    shared->options = options;
    shared->bundle = Bundle::open(path, options.verify);
    shared->tokenizer = shared->bundle.tokenizer();
    const std::string folder = !options.cache ? "" : options.cache_dir.empty() ? cache_folder() : options.cache_dir;
    state->backend =
        open_backend(options.backend, shared->bundle,
                     {options.precision, folder, options.threads, options.engines, options.trusted, options.plugins});
    shared->on_gpu = resizes_on_gpu(options.resize, *state->backend);
    const std::string text_key = state->backend->text_key();
    // Files that nobody hashed may encode otherwise than the manifest says: their prompts stay in memory.
    shared->key = shared->bundle.verified ? shared->bundle.key : "unverified " + path;
    if (!text_key.empty()) shared->key = sha256_hex(shared->key + " " + text_key);
    shared->prompts = std::make_unique<PromptCache>(shared->bundle.verified ? folder : "", shared->key);
    state->shared = std::move(shared);
    return Detector(std::move(state));
  });
}

Detector Detector::clone() const {
  return guarded([&] {
    detail::DetectorState& from = state();
    const auto lock = held(from);
    auto twin = std::make_unique<detail::DetectorState>();
    twin->shared = from.shared;
    twin->backend = from.backend->clone();
    return Detector(std::move(twin));
  });
}

namespace {

/// The embedding of token ids: from memory, from disk, or from the text branch.
Embedding embedding_of(detail::DetectorState& state, const std::vector<std::int64_t>& ids) {
  detail::Shared& shared = *state.shared;
  Embedding known = shared.prompts->get(ids, shared.bundle.width);
  if (known) return known;
  const auto lock = held(state);
  auto made = std::make_shared<const std::vector<float>>(state.backend->encode_text(ids));
  shared.prompts->put(ids, shared.bundle.width, made);
  return made;
}

std::shared_ptr<const detail::PromptData> encoded(detail::DetectorState& state, std::vector<TokenizedPrompt> prompts) {
  auto data = std::make_shared<detail::PromptData>();
  data->bundle_key = state.shared->key;
  for (TokenizedPrompt& prompt : prompts) {
    data->phrases.insert(data->phrases.end(), prompt.phrases.begin(), prompt.phrases.end());
    Embedding embedding = embedding_of(state, prompt.ids);
    std::vector<float> map = class_map(prompt);
    data->chunks.push_back({std::move(prompt), std::move(embedding), std::move(map)});
  }
  return data;
}

std::shared_ptr<const detail::PromptData> encoded(detail::DetectorState& state, const MarkedCaption& draft) {
  return encoded(state,
                 std::vector<TokenizedPrompt>{tokenize(draft, state.shared->tokenizer, state.shared->bundle.max_tokens)});
}

void check_prompt(const detail::PromptData& data, const std::string& key, const std::vector<float>& thresholds) {
  if (data.bundle_key != key) {
    throw Error(ErrorKind::prompt,
                "the prompt was encoded by a detector of another bundle or precision; encode it again"
                " with this one");
  }
  if (thresholds.size() != data.phrases.size()) {
    throw Error(ErrorKind::option, std::to_string(thresholds.size()) + " thresholds are given, the prompt has " +
                                       std::to_string(data.phrases.size()) + " classes; give one number, or one per class");
  }
  for (const float threshold : thresholds) {
    if (!(threshold >= 0.0f && threshold <= 1.0f)) {
      throw Error(ErrorKind::option, "threshold is " + std::to_string(threshold) + "; it must be in [0, 1]");
    }
  }
}

/// Append the candidates of a chunk, whose labels follow those of the chunks before it.
void append(Candidates& all, Candidates&& of_chunk, std::int64_t first) {
  for (std::int64_t& label : of_chunk.labels) label += first;
  if (all.scores.empty()) {
    all = std::move(of_chunk);
    return;
  }
  all.boxes.insert(all.boxes.end(), of_chunk.boxes.begin(), of_chunk.boxes.end());
  all.scores.insert(all.scores.end(), of_chunk.scores.begin(), of_chunk.scores.end());
  all.labels.insert(all.labels.end(), of_chunk.labels.begin(), of_chunk.labels.end());
}

std::vector<float> one_for_all(const Prompt& prompt, float threshold) {
  const std::size_t classes = prompt.phrases().size();
  return guarded([&] { return std::vector<float>(classes, threshold); });
}

}  // namespace

Prompt Detector::encode(const std::vector<std::string>& names, std::size_t classes_per_prompt) {
  return guarded([&] {
    detail::DetectorState& open = state();
    Prompt out;
    out.data_ =
        encoded(open, tokenize_names(names, open.shared->tokenizer, open.shared->bundle.max_tokens, classes_per_prompt));
    return out;
  });
}

Prompt Detector::encode(const std::string& caption) {
  return guarded([&] {
    detail::DetectorState& open = state();
    Prompt out;
    out.data_ = encoded(open, mark_caption(caption));
    return out;
  });
}

Prompt Detector::encode(const std::string& caption, const std::vector<Phrase>& phrases) {
  return guarded([&] {
    detail::DetectorState& open = state();
    Prompt out;
    out.data_ = encoded(open, mark_spans(caption, phrases));
    return out;
  });
}

Detector::Found Detector::find(const std::vector<ImageView>& images, const std::vector<Prompt>& prompts,
                               const std::vector<std::vector<float>>& thresholds) {
  return guarded([&] {
    detail::DetectorState& open = state();
    std::vector<PromptInput> inputs;
    for (std::size_t i = 0; i < prompts.size(); ++i) {
      const detail::PromptData& data = filled(prompts[i].data_);
      check_prompt(data, open.shared->key, thresholds[i]);
      for (const detail::PromptChunk& chunk : data.chunks) {
        inputs.push_back({*chunk.embedding, chunk.class_map, chunk.tokenized.ids.size(), chunk.tokenized.phrases.size()});
      }
    }
    const auto lock = held(open);
    const Options& options = open.shared->options;
    const Bundle& bundle = open.shared->bundle;
    make_canvas(images, options.shortest_side, options.longest_side, open.canvas, open.backend->reads_cuda(),
                open.shared->on_gpu);
    std::vector<std::vector<Candidates>> by_chunk = open.backend->detect(open.canvas, inputs);
    if (by_chunk.size() != inputs.size()) {
      throw Error(ErrorKind::backend, "the backend answered " + std::to_string(by_chunk.size()) + " of " +
                                          std::to_string(inputs.size()) + " prompts; please report it");
    }
    Found out;
    std::size_t next = 0;
    for (std::size_t i = 0; i < prompts.size(); ++i) {
      const detail::PromptData& data = *prompts[i].data_;
      std::vector<Candidates> joined(images.size());
      std::int64_t first = 0;
      for (const detail::PromptChunk& chunk : data.chunks) {
        for (std::size_t at = 0; at < images.size(); ++at) append(joined[at], std::move(by_chunk[next].at(at)), first);
        first += static_cast<std::int64_t>(chunk.tokenized.phrases.size());
        ++next;
      }
      out.emplace_back();
      for (std::size_t at = 0; at < images.size(); ++at) {
        out.back().push_back(select(joined[at], thresholds[i], data.phrases, open.canvas.pictures[at],
                                    open.canvas.originals[at], bundle.nms_iou, bundle.max_detections));
      }
    }
    return out;
  });
}

std::vector<Detection> Detector::detect(const ImageView& image, const Prompt& prompt, float threshold) {
  return detect(image, prompt, one_for_all(prompt, threshold));
}

std::vector<Detection> Detector::detect(const ImageView& image, const Prompt& prompt, const std::vector<float>& thresholds) {
  return guarded([&] { return std::move(find({image}, {prompt}, {thresholds})[0][0]); });
}

std::vector<std::vector<Detection>> Detector::detect(const std::vector<ImageView>& images, const Prompt& prompt,
                                                     float threshold) {
  return detect(images, prompt, one_for_all(prompt, threshold));
}

std::vector<std::vector<Detection>> Detector::detect(const std::vector<ImageView>& images, const Prompt& prompt,
                                                     const std::vector<float>& thresholds) {
  return guarded([&] { return std::move(find(images, {prompt}, {thresholds})[0]); });
}

std::vector<std::vector<Detection>> Detector::detect_prompts(const ImageView& image, const std::vector<Prompt>& prompts,
                                                             float threshold) {
  return guarded([&] {
    std::vector<std::vector<float>> thresholds;
    thresholds.reserve(prompts.size());
    for (const Prompt& prompt : prompts) thresholds.push_back(one_for_all(prompt, threshold));
    return detect_prompts(image, prompts, thresholds);
  });
}

std::vector<std::vector<Detection>> Detector::detect_prompts(const ImageView& image, const std::vector<Prompt>& prompts,
                                                             const std::vector<std::vector<float>>& thresholds) {
  return guarded([&] {
    if (prompts.empty()) throw Error(ErrorKind::prompt, "there are no prompts; give at least one");
    if (thresholds.size() != prompts.size()) {
      throw Error(ErrorKind::option, "thresholds of " + std::to_string(thresholds.size()) + " prompts are given for " +
                                         std::to_string(prompts.size()) + "; give those of each, or one number");
    }
    std::vector<std::vector<Detection>> out;
    for (auto& of_prompt : find({image}, prompts, thresholds)) out.push_back(std::move(of_prompt[0]));
    return out;
  });
}

const char* Detector::resize() const {
  return guarded([&] { return state().shared->on_gpu ? "gpu" : "exact"; });
}

void Detector::close() noexcept {
  if (!state_) return;
  const std::lock_guard<std::mutex> lock(state_->mutex);
  state_->closed = true;
  state_->backend.reset();
  state_->canvas = {};
}

const char* version() noexcept { return GLIP_VERSION; }

}  // namespace glip
