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
  std::string key;  ///< of the embeddings
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

const std::vector<std::string>& Prompt::phrases() const { return filled(data_).tokenized.phrases; }
const std::vector<std::int64_t>& Prompt::tokens() const { return filled(data_).tokenized.ids; }

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
    state->backend = open_backend(options.backend, shared->bundle, {options.precision, folder, options.threads});
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

std::shared_ptr<const detail::PromptData> encoded(detail::DetectorState& state, const MarkedCaption& draft) {
  detail::Shared& shared = *state.shared;
  auto data = std::make_shared<detail::PromptData>();
  data->tokenized = tokenize(draft, shared.tokenizer, shared.bundle.max_tokens);
  data->class_map = class_map(data->tokenized);
  data->bundle_key = shared.key;
  const auto& ids = data->tokenized.ids;
  data->embedding = shared.prompts->get(ids, shared.bundle.width);
  if (!data->embedding) {
    const auto lock = held(state);
    data->embedding = std::make_shared<const std::vector<float>>(state.backend->encode_text(ids));
    shared.prompts->put(ids, shared.bundle.width, data->embedding);
  }
  return data;
}

}  // namespace

Prompt Detector::encode(const std::vector<std::string>& names) {
  return guarded([&] {
    detail::DetectorState& open = state();
    Prompt out;
    out.data_ = encoded(open, mark_names(names));
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

std::vector<Detection> Detector::detect(const ImageView& image, const Prompt& prompt, float threshold) {
  const std::size_t classes = prompt.phrases().size();
  return detect(image, prompt, guarded([&] { return std::vector<float>(classes, threshold); }));
}

std::vector<Detection> Detector::detect(const ImageView& image, const Prompt& prompt,
                                        const std::vector<float>& thresholds) {
  return guarded([&] {
    detail::DetectorState& open = state();
    const auto& phrases = prompt.phrases();
    const detail::PromptData& data = *prompt.data_;
    if (data.bundle_key != open.shared->key) {
      throw Error(ErrorKind::prompt, "the prompt was encoded by a detector of another bundle or precision; encode it again"
                                     " with this one");
    }
    if (thresholds.size() != phrases.size()) {
      throw Error(ErrorKind::option, std::to_string(thresholds.size()) + " thresholds are given, the prompt has " +
                                         std::to_string(phrases.size()) + " classes; give one number, or one per class");
    }
    for (const float threshold : thresholds) {
      if (!(threshold >= 0.0f && threshold <= 1.0f)) {
        throw Error(ErrorKind::option, "threshold is " + std::to_string(threshold) + "; it must be in [0, 1]");
      }
    }
    const auto lock = held(open);
    const Options& options = open.shared->options;
    make_canvas(image, options.shortest_side, options.longest_side, open.canvas);
    const Candidates found =
        open.backend->detect(open.canvas, *data.embedding, data.class_map, data.tokenized.ids.size());
    return select(found, thresholds, phrases, open.canvas.picture, open.canvas.original, open.shared->bundle.nms_iou,
                  open.shared->bundle.max_detections);
  });
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
