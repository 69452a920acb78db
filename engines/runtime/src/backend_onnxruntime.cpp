// ONNX Runtime on the CPU, through its C interface; glip_deploy/backends/onnxruntime.py is the same in Python.
//
// The library is opened at run time, by the name that it gives itself.

#include <onnxruntime_c_api.h>

#include <algorithm>
#include <array>
#include <cstdlib>
#include <mutex>

#include "backend.hpp"
#include "shared_library.hpp"

namespace glip {
namespace {

constexpr int kOldest[] = {1, 25};  // the first whose CPU provider runs the standard DeformConv
// All that is used here came before this version of the interface, so that older headers drive newer libraries, and the
// other way round.
constexpr std::uint32_t kInterface = std::min(ORT_API_VERSION, 16);
const char* const kInstall = "install a release archive of it, and name its lib folder in LD_LIBRARY_PATH";
constexpr std::array<const char*, 3> kCandidates = {"boxes", "scores", "labels"};

/// The library, and its environment, which ends with the process.
struct Library {
  Library() {
    // From 1.29 on it keeps an identifier of the machine and reports models and times to its maker, unless told not to before
    // it is loaded (its Privacy.md). A variable that is set stays.
    setenv("ORT_DISABLE_TELEMETRY", "1", 0);
    const auto opened =
        SharedLibrary::open("ONNX Runtime is not installed", {"libonnxruntime.so.1", "libonnxruntime.so"}, kInstall);
    const OrtApiBase* base = opened.function<const OrtApiBase* (*)()>("OrtGetApiBase")();
    const std::string version = base->GetVersionString();
    const int major = std::atoi(version.c_str()), minor = std::atoi(version.substr(version.find('.') + 1).c_str());
    if (major < kOldest[0] || (major == kOldest[0] && minor < kOldest[1])) {
      throw Error(ErrorKind::backend,
                  "ONNX Runtime " + version + " has no deformable convolution on the CPU; install 1.25 or newer");
    }
    api = base->GetApi(kInterface);
    if (!api) throw Error(ErrorKind::backend, "ONNX Runtime " + version + " lacks its interface " + std::to_string(kInterface));
    check(api->CreateEnv(ORT_LOGGING_LEVEL_FATAL, "glip", &env), "cannot start");
    check(api->CreateCpuMemoryInfo(OrtArenaAllocator, OrtMemTypeDefault, &memory), "cannot start");
  }

  void check(OrtStatus* status, const std::string& what, const std::string& advice = "") const {
    if (!status) return;
    std::string reason = api->GetErrorMessage(status);
    api->ReleaseStatus(status);
    reason = reason.substr(0, std::min<std::size_t>(reason.find('\n'), 200));
    throw Error(ErrorKind::backend, "ONNX Runtime " + what + ": " + reason + advice);
  }

  const OrtApi* api = nullptr;
  OrtEnv* env = nullptr;
  OrtMemoryInfo* memory = nullptr;
};

const Library& the_library() {
  static const auto* const library = new Library;  // never freed: threads of a detector may outlive main; again after an error
  return *library;
}

struct Release {
  void operator()(OrtSession* session) const { the_library().api->ReleaseSession(session); }
  void operator()(OrtSessionOptions* options) const { the_library().api->ReleaseSessionOptions(options); }
  void operator()(OrtValue* value) const { the_library().api->ReleaseValue(value); }
  void operator()(OrtTensorTypeAndShapeInfo* info) const { the_library().api->ReleaseTensorTypeAndShapeInfo(info); }
};
template <typename T>
using Owned = std::unique_ptr<T, Release>;
using Value = Owned<OrtValue>;

/// One graph. It runs calls of several threads side by side.
class Session {
 public:
  Session(const std::string& file, int threads) : file_(file) {
    OrtSessionOptions* made = nullptr;
    library_.check(library_.api->CreateSessionOptions(&made), "cannot start");
    const Owned<OrtSessionOptions> options(made);
    library_.check(library_.api->SetSessionLogSeverityLevel(options.get(), ORT_LOGGING_LEVEL_FATAL), "cannot start");
    // Its threads would go on spinning for tens of milliseconds after a run, on cores that other work could use.
    library_.check(library_.api->AddSessionConfigEntry(options.get(), "session.force_spinning_stop", "1"), "cannot start");
    if (threads > 0) library_.check(library_.api->SetIntraOpNumThreads(options.get(), threads), "cannot start");
    OrtSession* session = nullptr;
    library_.check(library_.api->CreateSession(library_.env, file.c_str(), options.get(), &session), "cannot load " + file,
                   "; export the bundle again");
    session_.reset(session);
    OrtAllocator* allocator = nullptr;
    std::size_t count = 0;
    library_.check(library_.api->GetAllocatorWithDefaultOptions(&allocator), "cannot start");
    library_.check(library_.api->SessionGetOutputCount(session, &count), "cannot start");
    for (std::size_t i = 0; i < count; ++i) {
      char* name = nullptr;
      library_.check(library_.api->SessionGetOutputName(session, i, allocator, &name), "cannot start");
      outputs_.emplace_back(name);
      library_.check(library_.api->AllocatorFree(allocator, name), "cannot start");
    }
  }

  const std::vector<std::string>& outputs() const { return outputs_; }

  std::vector<Value> run(const std::vector<std::pair<std::string, const OrtValue*>>& inputs,
                         const std::vector<std::string>& outputs) const {
    std::vector<const char*> in, out;
    std::vector<const OrtValue*> given;
    for (const auto& [name, value] : inputs) in.push_back(name.c_str()), given.push_back(value);
    for (const std::string& name : outputs) out.push_back(name.c_str());
    std::vector<OrtValue*> made(out.size(), nullptr);
    OrtStatus* status =
        library_.api->Run(session_.get(), nullptr, in.data(), given.data(), in.size(), out.data(), out.size(), made.data());
    std::vector<Value> results(made.begin(), made.end());
    library_.check(status, "failed on " + file_);
    return results;
  }

 private:
  const Library& library_ = the_library();
  std::string file_;
  Owned<OrtSession> session_;
  std::vector<std::string> outputs_;
};

/// The sessions of a bundle's graphs, which clones share. The image branch is loaded whole; the first frame with several
/// prompts loads its two parts instead, and they serve single prompts too from then on, so that no weight is in memory twice.
class Sessions {
 public:
  Sessions(Bundle bundle, int threads) : bundle_(std::move(bundle)), threads_(threads), image_(load("image.onnx")) {}

  std::shared_ptr<Session> text() {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (!text_) text_ = load("text.onnx");
    return text_;
  }

  /// The image branch as a whole; empty once its parts are loaded.
  std::shared_ptr<Session> image() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return image_;
  }

  /// The backbone and the head; empty where the bundle is not split.
  std::pair<std::shared_ptr<Session>, std::shared_ptr<Session>> parts() {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (!head_ && bundle_.split) {
      image_.reset();  // first, so that its memory is free for the parts
      try {
        backbone_ = load("backbone.onnx");
        head_ = load("head.onnx");
      } catch (...) {
        backbone_.reset();
        image_ = load("image.onnx");
        throw;
      }
    }
    return {backbone_, head_};
  }

 private:
  std::shared_ptr<Session> load(const std::string& graph) const {
    auto session = std::make_shared<Session>(bundle_.file(graph), threads_);
    bundle_.check_unchanged();
    return session;
  }

  Bundle bundle_;
  int threads_;
  std::mutex mutex_;
  std::shared_ptr<Session> text_, image_, backbone_, head_;
};

template <typename T>
constexpr ONNXTensorElementDataType kType = ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;
template <>
constexpr ONNXTensorElementDataType kType<float> = ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
template <>
constexpr ONNXTensorElementDataType kType<std::int64_t> = ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64;
template <>
constexpr ONNXTensorElementDataType kType<std::uint8_t> = ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8;

/// An input that lies in `values`, which are only read.
template <typename T>
Value view(const std::vector<std::size_t>& shape, const std::vector<T>& values) {
  const std::vector<std::int64_t> sides(shape.begin(), shape.end());
  OrtValue* made = nullptr;
  const Library& library = the_library();
  library.check(
      library.api->CreateTensorWithDataAsOrtValue(library.memory, const_cast<T*>(values.data()), values.size() * sizeof(T),
                                                  sides.data(), sides.size(), kType<T>, &made),
      "refused an input");
  return Value(made);
}

/// The part of an output that belongs to one of the pictures of a batch.
template <typename T>
std::vector<T> part(const Value& value, std::size_t picture, std::size_t pictures) {
  const Library& library = the_library();
  OrtTensorTypeAndShapeInfo* made = nullptr;
  library.check(library.api->GetTensorTypeAndShape(value.get(), &made), "gave no tensor");
  const Owned<OrtTensorTypeAndShapeInfo> info(made);
  std::size_t count = 0;
  ONNXTensorElementDataType type{};
  void* data = nullptr;
  library.check(library.api->GetTensorShapeElementCount(info.get(), &count), "gave no tensor");
  library.check(library.api->GetTensorElementType(info.get(), &type), "gave no tensor");
  if (type != kType<T>) {
    throw Error(ErrorKind::backend, "a graph gives a tensor of type " + std::to_string(type) + "; export the bundle again");
  }
  library.check(library.api->GetTensorMutableData(value.get(), &data), "gave no tensor");
  const T* const begin = static_cast<const T*>(data) + picture * (count / pictures);
  return std::vector<T>(begin, begin + count / pictures);
}

template <typename T>
std::vector<T> repeated(const std::vector<T>& values, std::size_t times) {
  std::vector<T> out;
  out.reserve(values.size() * times);
  for (std::size_t i = 0; i < times; ++i) out.insert(out.end(), values.begin(), values.end());
  return out;
}

class OnnxRuntimeBackend : public Backend {
 public:
  explicit OnnxRuntimeBackend(std::shared_ptr<Sessions> sessions) : sessions_(std::move(sessions)) {}

  std::vector<float> encode_text(const std::vector<std::int64_t>& ids) override {
    const std::vector<std::int64_t> ones(ids.size(), 1);
    const Value input = view<std::int64_t>({1, ids.size()}, ids), mask = view<std::int64_t>({1, ids.size()}, ones);
    const auto found = sessions_->text()->run({{"input_ids", input.get()}, {"attention_mask", mask.get()}}, {"text_embedding"});
    return part<float>(found[0], 0, 1);
  }

  std::vector<std::vector<Candidates>> detect(const Canvas& canvas, const std::vector<PromptInput>& prompts) override {
    const std::size_t batch = canvas.pictures.size();
    const auto height = static_cast<std::size_t>(canvas.canvas.height), width = static_cast<std::size_t>(canvas.canvas.width);
    std::vector<std::int64_t> rows;
    for (const Size& picture : canvas.pictures) rows.insert(rows.end(), {picture.height, picture.width});
    const Value frames = view<std::uint8_t>({batch, height, width, 3}, canvas.pixels);
    const Value sizes = view<std::int64_t>({batch, 2}, rows);
    std::vector<Value> features;
    std::vector<std::pair<std::string, const OrtValue*>> of_frame{{"image_sizes", sizes.get()}};
    std::shared_ptr<Session> last = prompts.size() == 1 ? sessions_->image() : nullptr;
    if (!last) {
      const auto [backbone, head] = sessions_->parts();
      last = head ? head : sessions_->image();
      if (head) {
        features = backbone->run({{"frames", frames.get()}, {"image_sizes", sizes.get()}}, backbone->outputs());
        for (std::size_t i = 0; i < features.size(); ++i) of_frame.emplace_back(backbone->outputs()[i], features[i].get());
      }
    }
    if (features.empty()) of_frame.emplace_back("frames", frames.get());
    std::vector<std::vector<Candidates>> out;
    out.reserve(prompts.size());
    for (const PromptInput& prompt : prompts) out.push_back(run(*last, of_frame, prompt, batch));
    return out;
  }

  std::unique_ptr<Backend> clone() const override { return std::make_unique<OnnxRuntimeBackend>(sessions_); }
  std::string text_key() const override { return ""; }

 private:
  static std::vector<Candidates> run(const Session& session, std::vector<std::pair<std::string, const OrtValue*>> inputs,
                                     const PromptInput& prompt, std::size_t batch) {
    const std::size_t tokens = prompt.tokens, width = prompt.embedding.size() / tokens;
    const std::vector<std::int64_t> ones(batch * tokens, 1);
    std::vector<float> embeddings, maps;
    if (batch > 1) {
      embeddings = repeated(prompt.embedding, batch);
      maps = repeated(prompt.class_map, batch);
    }
    const Value embedding = view({batch, tokens, width}, batch > 1 ? embeddings : prompt.embedding);
    const Value mask = view({batch, tokens}, ones);
    const Value map = view({batch, prompt.classes, tokens}, batch > 1 ? maps : prompt.class_map);
    inputs.insert(inputs.end(), {{"text_embedding", embedding.get()}, {"text_mask", mask.get()}, {"class_map", map.get()}});
    const auto found = session.run(inputs, {kCandidates.begin(), kCandidates.end()});
    std::vector<Candidates> out;
    for (std::size_t i = 0; i < batch; ++i) {
      out.push_back({part<float>(found[0], i, batch), part<float>(found[1], i, batch), part<std::int64_t>(found[2], i, batch)});
    }
    return out;
  }

  std::shared_ptr<Sessions> sessions_;
};

}  // namespace
}  // namespace glip

extern "C" __attribute__((visibility("default"))) glip::Backend* glip_open_backend(const glip::Bundle& bundle,
                                                                                   const glip::BackendOptions& options) {
  return new glip::OnnxRuntimeBackend(std::make_shared<glip::Sessions>(bundle, options.threads));
}
