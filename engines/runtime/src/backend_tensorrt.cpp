// TensorRT, or TensorRT-RTX: engines that glip-build made, on the GPU they were made for; glip_deploy/backends/tensorrt.py is
// the same in Python.
//
// Pictures are resized on the GPU, where they are or uploaded as they are through page-locked memory, or come resized from the
// host. All goes through a stream of the backend's own. The first frame of a shape runs plainly, the second is recorded as a
// CUDA graph, later ones replay it: the upload of a resized picture, network and download are one launch. What belongs to the
// prompt is uploaded when it changes.

#include <algorithm>
#include <cstring>
#include <list>
#include <set>

#include "backend.hpp"
#include "cuda.hpp"
#include "engines.hpp"
#include "trt_engine.hpp"

namespace glip {
namespace {

/// Shapes of each graph that keep their buffers and CUDA graph; of more, the one unused for longest gives way.
const std::map<std::string, std::size_t> kShapesKept = {{"text", 2}, {"image", 4}, {"backbone", 2}, {"head", 8}};
/// Prompts are padded to multiples of these within a profile's range, so that most new prompts are only an upload.
constexpr std::int64_t kTokenStep = 16, kClassStep = 8;
const std::vector<std::string> kCandidates = {"boxes", "scores", "labels"};

[[noreturn]] void refuse(const std::string& message) { throw Error(ErrorKind::missing, message); }

bool per_frame(const std::string& name) { return name == "frames" || name == "image_sizes"; }
bool is_part(const std::string& graph) { return graph == "backbone" || graph == "head"; }

std::int64_t padded(std::int64_t count, std::int64_t step, std::int64_t least, std::int64_t most) {
  return std::min(std::max((count + step - 1) / step * step, least), most);
}

std::size_t volume(const Shape& shape) {
  std::size_t out = 1;
  for (const std::int64_t side : shape) out *= static_cast<std::size_t>(side);
  return out;
}

std::string text_of(const Shape& shape) {
  std::string out;
  for (const std::int64_t side : shape) out += (out.empty() ? "(" : ", ") + std::to_string(side);
  return out + ")";
}

nvinfer1::Dims dims_of(const Shape& shape) {
  nvinfer1::Dims out{};
  out.nbDims = static_cast<int>(shape.size());
  for (std::size_t i = 0; i < shape.size(); ++i) out.d[i] = static_cast<std::decay_t<decltype(out.d[0])>>(shape[i]);
  return out;
}

/// An input of a run.
struct Given {
  enum class Where { host, pictures, borrowed };
  Shape shape;
  Where where = Where::host;
  std::vector<float> numbers;        ///< host, of a type with fractions
  std::vector<std::int64_t> wholes;  ///< host, of whole numbers
  const Canvas* canvas = nullptr;    ///< host or pictures: those from `first` on, as many as `count`
  std::size_t first = 0, count = 0;
  CUdeviceptr address = 0;  ///< borrowed: where another engine left it
};

using Feed = std::map<std::string, Given>;

Given numbers(Shape shape, std::vector<float> values) {
  Given out;
  out.shape = std::move(shape);
  out.numbers = std::move(values);
  return out;
}

Given wholes(Shape shape, std::vector<std::int64_t> values) {
  Given out;
  out.shape = std::move(shape);
  out.wholes = std::move(values);
  return out;
}

/// Buffers of one shape, bound to an execution context of their own.
struct Bound {
  struct Staging {
    void* memory;
    std::size_t bytes;
  };

  explicit Bound(const Cuda& gpu) : cuda(gpu) {}
  Bound(const Bound&) = delete;
  Bound& operator=(const Bound&) = delete;
  ~Bound() {  // with the GPU's context current, and the device's mutex held
    if (graph) cuda.free_graph(graph);
    context.reset();  // before the memory that it points to
    for (const auto& [name, address] : device) {
      if (!borrowed.count(address)) cuda.free(address);
    }
    for (const auto& [name, staged] : staging) cuda.free_pinned(staged.memory);
  }

  const Cuda& cuda;
  std::unique_ptr<nvinfer1::IExecutionContext> context;
  std::map<std::string, Staging> staging;  ///< page-locked; pictures that are on the GPU have none
  std::map<std::string, CUdeviceptr> device;
  std::map<std::string, Shape> shapes;
  std::set<CUdeviceptr> borrowed;  ///< of `device`: another engine's
  std::uint64_t runs = 0;
  std::uint64_t capture_at = 1;  ///< the run that is recorded: the first runs plainly; after a failure, twice as many later
  CUgraphExec graph = nullptr;
};

/// Page-locked and GPU memory of as many bytes, for pictures of the host that are resized on the GPU.
struct Raw {
  explicit Raw(const Cuda& gpu) : cuda(gpu) {}
  Raw(const Raw&) = delete;
  Raw& operator=(const Raw&) = delete;
  ~Raw() {  // with the GPU's context current, and the device's mutex held
    if (staging) cuda.free_pinned(staging);
    if (device) cuda.free(device);
  }

  const Cuda& cuda;
  std::size_t bytes = 0;
  void* staging = nullptr;
  CUdeviceptr device = 0;
};

/// What clones share: engines that are loaded, and what they belong to.
class Opened {
 public:
  Opened(const Bundle& bundle, const BackendOptions& options, std::shared_ptr<Cuda> gpu)
      : cuda(std::move(gpu)), max_tokens_(bundle.max_tokens), cache_folder_(options.cache_folder) {
    TensorRt* library = nullptr;
    record = choose_engines(bundle, options.folders, options.plugins, cuda->gpu(), [&](const EngineRecord& candidate) {
      library = &TensorRt::of(candidate);
      return library->version();
    });
    tensorrt_ = library;
    rebuild = "glip-build " + bundle.path + " --flavor " + record.flavor;
    const Cuda::Active active(*cuda);
    if (!record.plugin.empty()) tensorrt_->load_plugin(record.file(record.plugin));
    try {
      for (const char* graph : {"text", "image"}) engine(graph);
    } catch (...) {
      free_engines();
      throw;
    }
  }

  ~Opened() {
    try {
      const std::lock_guard<std::recursive_mutex> lock(device_mutex());
      const Cuda::Active active(*cuda);
      free_engines();
    } catch (const Error&) {  // the GPU is gone; its memory is too
    }
  }

  Opened(const Opened&) = delete;
  Opened& operator=(const Opened&) = delete;

  /// The engine of a graph, loaded by its first use.
  const Engine& engine(const std::string& graph) {
    const std::lock_guard<std::recursive_mutex> lock(device_mutex());
    auto& loaded = engines_[graph];
    if (!loaded) {
      const Cuda::Active active(*cuda);
      loaded = std::make_unique<Engine>(*tensorrt_, record, graph, cache_folder_, cuda->gpu());
    }
    return *loaded;
  }

  /// Write the kernels that were compiled for the shapes met so far.
  void keep_kernels() noexcept {
    for (const auto& [graph, loaded] : engines_) {
      if (loaded) loaded->keep_kernels();
    }
  }

  bool has_parts() const { return record.engines.count("backbone.plan") && record.engines.count("head.plan"); }

  /// Bytes that contexts of the parts, or of the others, compute in.
  std::size_t memory_of(bool parts) {
    std::size_t out = 0;
    for (const char* graph : {"text", "image", "backbone", "head"}) {
      if (is_part(graph) == parts) out = std::max(out, engine(graph).memory_bytes);
    }
    return out;
  }

  std::shared_ptr<Cuda> cuda;
  EngineRecord record;
  std::string rebuild;  ///< the command that builds the engines again
  std::size_t max_tokens() const { return max_tokens_; }

 private:
  void free_engines() { engines_.clear(); }

  std::size_t max_tokens_;
  std::string cache_folder_;
  TensorRt* tensorrt_ = nullptr;
  std::map<std::string, std::unique_ptr<Engine>> engines_;
};

class TensorRtBackend : public Backend {
 public:
  explicit TensorRtBackend(std::shared_ptr<Opened> opened) : opened_(std::move(opened)), cuda_(*opened_->cuda) {
    const Cuda::Active active(cuda_);
    stream_ = cuda_.stream();
  }

  ~TensorRtBackend() override {
    try {
      const std::lock_guard<std::recursive_mutex> lock(device_mutex());
      const Cuda::Active active(cuda_);
      try {
        cuda_.synchronize(stream_);
      } catch (const Error&) {  // what failed while it ran has been reported
      }
      bound_.clear();
      raw_.reset();
      for (const auto& [parts, memory] : memory_) cuda_.free(memory);
      opened_->keep_kernels();
      cuda_.free_stream(stream_);
    } catch (const Error&) {  // the GPU is gone
    }
  }

  TensorRtBackend(const TensorRtBackend&) = delete;
  TensorRtBackend& operator=(const TensorRtBackend&) = delete;

  std::vector<float> encode_text(const std::vector<std::int64_t>& ids) override {
    const auto count = static_cast<std::int64_t>(ids.size());
    const auto [index, tokens] = bucket("text", "input_ids", count);
    std::vector<std::int64_t> input(ids), mask(ids.size(), 1);
    input.resize(static_cast<std::size_t>(tokens), 0);
    mask.resize(static_cast<std::size_t>(tokens), 0);
    Feed feed;
    feed["input_ids"] = wholes({1, tokens}, std::move(input));
    feed["attention_mask"] = wholes({1, tokens}, std::move(mask));
    const Cuda::Active active(cuda_);
    const Bound& bound = execute("text", index, feed, {"text_embedding"});
    cuda_.synchronize(stream_);
    std::vector<float> out = floats(bound, "text", "text_embedding");
    out.resize(out.size() / static_cast<std::size_t>(tokens) * ids.size());
    return out;
  }

  std::vector<std::vector<Candidates>> detect(const Canvas& canvas, const std::vector<PromptInput>& prompts) override {
    const bool parts = prompts.size() > 1 && opened_->has_parts();
    const Profile& profile = engine(parts ? "backbone" : "image").profiles()[0];
    const auto most = static_cast<std::size_t>(profile.at("frames")[2][0]);
    std::vector<std::vector<Candidates>> out(prompts.size());
    for (std::size_t first = 0; first < canvas.pictures.size(); first += most) {  // more pictures than the engine takes
      const std::size_t count = std::min(most, canvas.pictures.size() - first);
      const auto found = parts ? in_parts(canvas, first, count, prompts) : whole(canvas, first, count, prompts);
      for (std::size_t i = 0; i < prompts.size(); ++i) out[i].insert(out[i].end(), found[i].begin(), found[i].end());
    }
    return out;
  }

  std::unique_ptr<Backend> clone() const override { return std::make_unique<TensorRtBackend>(opened_); }
  std::string text_key() const override { return opened_->record.engines.at("text.plan").sha256; }
  bool reads_cuda() const override { return true; }

  bool prepare_resize() override {
    load_resize("open with resize \"exact\"");
    return true;
  }

 private:
  using Found = std::vector<std::vector<Candidates>>;

  /// An engine; asked for once, as a clone may hold the device's mutex for long.
  const Engine& engine(const std::string& graph) const {
    const Engine*& known = known_[graph];
    if (!known) known = &opened_->engine(graph);
    return *known;
  }

  Found whole(const Canvas& canvas, std::size_t first, std::size_t count, const std::vector<PromptInput>& prompts) {
    Found out;
    const Cuda::Active active(cuda_);
    for (const PromptInput& prompt : prompts) {
      Feed feed;
      const std::size_t index = add_prompt(feed, "image", prompt);
      add_frames(feed, engine("image").profiles()[index], canvas, first, count);
      repeat_prompt(feed, count);
      const Bound& bound = execute("image", index, feed, kCandidates);
      cuda_.synchronize(stream_);
      out.push_back(candidates(bound, "image", count));
    }
    return out;
  }

  /// The features stay on the GPU; nothing else comes between the two engines.
  Found in_parts(const Canvas& canvas, std::size_t first, std::size_t count, const std::vector<PromptInput>& prompts) {
    Feed frames;
    add_frames(frames, engine("backbone").profiles()[0], canvas, first, count);
    std::vector<std::pair<std::size_t, Feed>> of_prompts;
    for (const PromptInput& prompt : prompts) {  // all that may be refused, before anything runs
      Feed feed;
      feed["image_sizes"] = frames["image_sizes"];
      const std::size_t index = add_prompt(feed, "head", prompt);
      repeat_prompt(feed, count);
      of_prompts.emplace_back(index, std::move(feed));
    }
    Found out;
    const Cuda::Active active(cuda_);
    const Bound& backbone = execute("backbone", 0, frames, {});
    for (auto& [index, feed] : of_prompts) {
      for (const std::string& name : engine("backbone").outputs) {
        Given& feature = feed[name];
        feature.shape = backbone.shapes.at(name);
        feature.where = Given::Where::borrowed;
        feature.address = backbone.device.at(name);
      }
      const Bound& head = execute("head", index, feed, kCandidates);
      cuda_.synchronize(stream_);
      out.push_back(candidates(head, "head", count));
    }
    return out;
  }

  // -- shapes -----------------------------------------------------------------------------------------------------------

  /// The first optimization profile that a prompt of `count` tokens fits, and the length to pad it to.
  std::pair<std::size_t, std::int64_t> bucket(const std::string& graph, const std::string& tensor, std::int64_t count) {
    const auto& profiles = engine(graph).profiles();
    std::int64_t longest = 0;
    for (std::size_t index = 0; index < profiles.size(); ++index) {
      const auto& range = profiles[index].at(tensor);
      if (count <= range[2][1]) return {index, padded(count, kTokenStep, range[0][1], range[2][1])};
      longest = std::max(longest, range[2][1]);
    }
    refuse("the prompt has " + std::to_string(count) + " tokens, the engine takes up to " + std::to_string(longest) +
           "; shorten it, or build again: " + opened_->rebuild + " --tokens 1:16:" + std::to_string(opened_->max_tokens()));
  }

  /// Add the inputs that a prompt makes, for one picture and padded to what its profile takes; return that.
  std::size_t add_prompt(Feed& feed, const std::string& graph, const PromptInput& prompt) {
    const auto [index, tokens] = bucket(graph, "text_mask", static_cast<std::int64_t>(prompt.tokens));
    const auto& range = engine(graph).profiles()[index].at("class_map");
    const auto classes = static_cast<std::int64_t>(prompt.classes);
    if (classes > range[2][1]) {
      refuse("the prompt has " + std::to_string(classes) + " classes, the engine takes up to " + std::to_string(range[2][1]) +
             "; build again: " + opened_->rebuild + " --classes 1:8:" + std::to_string(classes));
    }
    const std::int64_t rows = padded(classes, kClassStep, range[0][1], range[2][1]);
    const auto width = static_cast<std::int64_t>(prompt.embedding.size() / prompt.tokens);
    std::vector<float> embedding(prompt.embedding);
    embedding.resize(static_cast<std::size_t>(tokens * width), 0.0f);
    std::vector<std::int64_t> mask(prompt.tokens, 1);
    mask.resize(static_cast<std::size_t>(tokens), 0);
    std::vector<float> map(static_cast<std::size_t>(rows * tokens), 0.0f);
    for (std::size_t row = 0; row < prompt.classes; ++row) {
      std::copy_n(&prompt.class_map[row * prompt.tokens], prompt.tokens, &map[row * static_cast<std::size_t>(tokens)]);
    }
    feed["text_embedding"] = numbers({1, tokens, width}, std::move(embedding));
    feed["text_mask"] = wholes({1, tokens}, std::move(mask));
    feed["class_map"] = numbers({1, rows, tokens}, std::move(map));
    return index;
  }

  /// Repeat a prompt for every picture, with zeros for the rest of the batch.
  static void repeat_prompt(Feed& feed, std::size_t pictures) {
    const std::int64_t batch = feed.at("image_sizes").shape[0];
    const auto repeat = [&](auto& values) {
      const auto one = values;
      values.clear();
      for (std::size_t i = 0; i < pictures; ++i) values.insert(values.end(), one.begin(), one.end());
      values.resize(one.size() * static_cast<std::size_t>(batch), 0);
    };
    for (const char* name : {"text_embedding", "text_mask", "class_map"}) {
      Given& given = feed.at(name);
      given.shape[0] = batch;
      repeat(given.numbers);
      repeat(given.wholes);
    }
  }

  /// Add the inputs that change with the frame, padded to what a profile takes.
  void add_frames(Feed& feed, const Profile& profile, const Canvas& canvas, std::size_t first, std::size_t count) const {
    const auto& [least, best, most] = profile.at("frames");
    const std::int64_t sides[] = {static_cast<std::int64_t>(count), canvas.canvas.height, canvas.canvas.width};
    Shape shape;
    for (std::size_t axis = 0; axis < 3; ++axis) {
      if (axis > 0 && sides[axis] > most[axis]) {
        refuse("the frame's canvas is " + std::to_string(sides[axis]) + " pixels in " + (axis == 1 ? "height" : "width") +
               ", the engine takes up to " + std::to_string(most[axis]) +
               "; lower the shortest side or build with a larger --max: " + opened_->rebuild);
      }
      shape.push_back(std::max(sides[axis], least[axis]));
    }
    std::vector<std::int64_t> sizes;
    for (std::size_t i = first; i < first + count; ++i) {
      sizes.insert(sizes.end(), {canvas.pictures[i].height, canvas.pictures[i].width});
    }
    sizes.resize(static_cast<std::size_t>(shape[0]) * 2, 1);
    feed["image_sizes"] = wholes({shape[0], 2}, std::move(sizes));
    shape.push_back(3);
    Given& frames = feed["frames"];
    frames.shape = std::move(shape);
    frames.where = canvas.unsized.empty() ? Given::Where::host : Given::Where::pictures;
    frames.canvas = &canvas;
    frames.first = first;
    frames.count = count;
  }

  // -- running ----------------------------------------------------------------------------------------------------------

  /// Enqueue a run of an engine, and the download of `outputs`; the others stay where they are.
  Bound& execute(const std::string& graph, std::size_t index, const Feed& feed, const std::vector<std::string>& outputs) {
    // Pictures resized on the host and pictures resized on the GPU make different CUDA graphs, as do other buffers of features.
    std::string key = std::to_string(index);
    for (const auto& [name, given] : feed) {
      key += " " + name + text_of(given.shape) + std::to_string(static_cast<int>(given.where)) + "@" +
             std::to_string(given.address);
    }
    auto& kept = bound_[graph];
    auto found = std::find_if(kept.begin(), kept.end(), [&](const auto& entry) { return entry.first == key; });
    if (found == kept.end()) {
      const std::lock_guard<std::recursive_mutex> lock(device_mutex());
      while (kept.size() >= kShapesKept.at(graph)) forget(kept);
      kept.emplace_front(key, bind(graph, index, feed, outputs));
    } else {
      kept.splice(kept.begin(), kept, found);
    }
    Bound& bound = *kept.front().second;
    const Engine& of = engine(graph);
    stage(bound, of, feed);
    enqueue(bound, of);
    ++bound.runs;
    return bound;
  }

  using Kept = std::list<std::pair<std::string, std::unique_ptr<Bound>>>;

  /// Free the buffers unused for longest, and first those of the engines that read them.
  void forget(Kept& kept) {
    const auto last = std::move(kept.back().second);
    kept.pop_back();
    bound_["head"].remove_if([&](const auto& head) {
      return std::any_of(last->device.begin(), last->device.end(), [&](const auto& buffer) {
        return !last->borrowed.count(buffer.second) && head.second->borrowed.count(buffer.second);
      });
    });
  }

  /// Make a context for these shapes, with buffers.
  std::unique_ptr<Bound> bind(const std::string& graph, std::size_t index, const Feed& feed,
                              const std::vector<std::string>& outputs) {
    const Engine& of = engine(graph);
    const bool parts = is_part(graph);
    if (!memory_.count(parts)) memory_[parts] = cuda_.allocate(opened_->memory_of(parts));
    auto bound = std::make_unique<Bound>(cuda_);
    bound->context = of.context(memory_[parts]);
    if (!bound->context) {
      throw Error(ErrorKind::backend, of.file() + ": the GPU has not enough free memory; close other programs");
    }
    nvinfer1::IExecutionContext& context = *bound->context;
    const std::string& rebuild = opened_->rebuild;
    if (!context.setOptimizationProfileAsync(static_cast<int>(index), stream_)) {
      refuse(of.file() + " refuses its profile " + std::to_string(index) + "; " + rebuild + " --overwrite");
    }
    for (const std::string& name : of.inputs) {
      const auto given = feed.find(name);
      if (given == feed.end()) refuse(of.file() + " has an input " + name + " that no bundle has; " + rebuild + " --overwrite");
      if (!context.setInputShape(name.c_str(), dims_of(given->second.shape))) {
        refuse(of.file() + " refuses " + name + " of shape " + text_of(given->second.shape) + "; " + rebuild);
      }
    }
    const char* open[8] = {};
    const int unknown = context.inferShapes(8, open);
    if (unknown != 0) {
      refuse(of.file() + " leaves the shape of " + (unknown > 0 && open[0] ? open[0] : "an output") + " open; " + rebuild);
    }
    std::vector<std::string> names(of.inputs);
    names.insert(names.end(), of.outputs.begin(), of.outputs.end());
    for (const std::string& name : names) {
      const nvinfer1::Dims dims = context.getTensorShape(name.c_str());
      Shape& shape = bound->shapes[name];
      for (int i = 0; i < dims.nbDims; ++i) shape.push_back(static_cast<std::int64_t>(dims.d[i]));
      const std::size_t bytes = volume(shape) * bytes_of(of.types.at(name));
      const auto given = feed.find(name);
      const bool reads = given != feed.end();
      const bool downloads = std::find(outputs.begin(), outputs.end(), name) != outputs.end();
      if ((reads && given->second.where == Given::Where::host) || downloads) {
        bound->staging[name] = {cuda_.pinned(bytes), bytes};
      }
      if (reads && given->second.where == Given::Where::borrowed) {
        bound->borrowed.insert(given->second.address);
        bound->device[name] = given->second.address;
      } else {
        bound->device[name] = cuda_.allocate(bytes);
      }
      if (!context.setTensorAddress(name.c_str(), reinterpret_cast<void*>(bound->device[name]))) {
        refuse(of.file() + " refuses the buffer of " + name + "; " + rebuild + " --overwrite");
      }
    }
    for (const std::string& name : outputs) {
      if (!bound->staging.count(name)) refuse(of.file() + " has no output " + name + "; " + rebuild + " --overwrite");
    }
    cuda_.synchronize(stream_);
    return bound;
  }

  /// Bring the inputs into page-locked memory; a prompt that is the last one is not uploaded again.
  void stage(Bound& bound, const Engine& of, const Feed& feed) {
    for (const std::string& name : of.inputs) {
      const Given& given = feed.at(name);
      if (given.where == Given::Where::borrowed) continue;
      if (given.where == Given::Where::pictures) {
        draw(given, bound.device.at(name));
        continue;
      }
      const Bound::Staging& staging = bound.staging.at(name);
      if (given.canvas) {
        copy_frames(given, static_cast<std::uint8_t*>(staging.memory), of.types.at(name));
        continue;
      }
      const std::vector<char> content = bytes_for(given, of.types.at(name), name);
      if (content.size() != staging.bytes)
        refuse(of.file() + " has another " + name + "; " + opened_->rebuild + " --overwrite");
      if (per_frame(name)) {
        std::memcpy(staging.memory, content.data(), content.size());
      } else if (bound.runs == 0 || std::memcmp(staging.memory, content.data(), content.size()) != 0) {
        std::memcpy(staging.memory, content.data(), content.size());
        cuda_.upload(bound.device.at(name), staging.memory, staging.bytes, stream_);
      }
    }
  }

  /// Copy pictures' canvases, with zeros around them, to the larger ones of an engine.
  void copy_frames(const Given& given, std::uint8_t* target, nvinfer1::DataType type) const {
    if (type != nvinfer1::DataType::kUINT8)
      refuse("the engine takes frames of another type; " + opened_->rebuild + " --overwrite");
    const auto height = static_cast<std::size_t>(given.shape[1]), row = static_cast<std::size_t>(given.shape[2]) * 3;
    const auto rows = static_cast<std::size_t>(given.canvas->canvas.height);
    const auto from_row = static_cast<std::size_t>(given.canvas->canvas.width) * 3;
    for (std::size_t i = 0; i < static_cast<std::size_t>(given.shape[0]); ++i) {
      for (std::size_t y = 0; y < height; ++y, target += row) {
        const std::size_t known = i < given.count && y < rows ? from_row : 0;
        if (known) std::memcpy(target, &given.canvas->pixels[((given.first + i) * rows + y) * from_row], known);
        std::memset(target + known, 0, row - known);
      }
    }
  }

  void load_resize(const char* instead) {
    if (resizes_) return;
    const std::lock_guard<std::recursive_mutex> lock(device_mutex());  // loading code takes memory
    const Cuda::Active active(cuda_);
    cuda_.prepare_resize(instead);
    resizes_ = true;
  }

  /// Memory for pictures of the host, as they are: made larger where it is too small.
  Raw& room_for(std::size_t bytes) {
    if (raw_ && raw_->bytes >= bytes) return *raw_;
    const std::lock_guard<std::recursive_mutex> lock(device_mutex());
    if (raw_) cuda_.synchronize(stream_);  // a frame that failed may still be on its way
    raw_.reset();
    auto made = std::make_unique<Raw>(cuda_);
    made->staging = cuda_.pinned(bytes);
    made->device = cuda_.allocate(bytes);
    made->bytes = bytes;
    raw_ = std::move(made);
    return *raw_;
  }

  /// Resize pictures on the GPU onto the canvas there; those of the host are uploaded first, one behind the other.
  void draw(const Given& given, CUdeviceptr address) {
    const Size canvas{static_cast<int>(given.shape[1]), static_cast<int>(given.shape[2])};
    const std::size_t bytes = volume(given.shape) / static_cast<std::size_t>(given.shape[0]);
    load_resize("copy the picture to the host");
    const auto& pictures = given.canvas->unsized;
    std::size_t needed = 0, start = 0;
    for (std::size_t i = given.first; i < given.first + given.count; ++i) {
      if (pictures[i].memory == Memory::host) needed += packed_bytes(pictures[i]);
    }
    Raw* const raw = needed > 0 ? &room_for(needed) : nullptr;
    for (std::size_t i = 0; i < given.count; ++i) {
      ImageView picture = pictures[given.first + i];
      if (raw) {
        const std::size_t size = packed_bytes(picture);
        auto* const staging = static_cast<std::uint8_t*>(raw->staging) + start;
        const CUdeviceptr place = raw->device + start;
        picture = pack(picture, staging, reinterpret_cast<const void*>(place));
        cuda_.upload(place, staging, size, stream_);
        start += size;
      } else {
        cuda_.synchronize(static_cast<CUstream>(picture.stream));  // null is the legacy default stream
      }
      cuda_.resize(picture, address + i * bytes, canvas, given.canvas->pictures[given.first + i], stream_);
    }
  }

  static std::vector<char> bytes_for(const Given& given, nvinfer1::DataType type, const std::string& name) {
    const auto bytes_of_values = [](const auto& values) {
      std::vector<char> out(values.size() * sizeof values[0]);
      if (!out.empty()) std::memcpy(out.data(), values.data(), out.size());
      return out;
    };
    if (!given.numbers.empty() && type == nvinfer1::DataType::kFLOAT) return bytes_of_values(given.numbers);
#if GLIP_INTERFACE >= 1000
    if (!given.wholes.empty() && type == nvinfer1::DataType::kINT64) return bytes_of_values(given.wholes);
#endif
    if (!given.wholes.empty() && type == nvinfer1::DataType::kINT32) {  // TensorRT 8.6 has no others
      return bytes_of_values(std::vector<std::int32_t>(given.wholes.begin(), given.wholes.end()));
    }
    refuse("the engine takes " + name + " in a type that no bundle has; build it again with glip-build");
  }

  void enqueue(Bound& bound, const Engine& of) {
    const auto frame = [&] {
      for (const std::string& name : of.inputs) {
        const auto staged = bound.staging.find(name);
        if (per_frame(name) && staged != bound.staging.end()) {
          cuda_.upload(bound.device.at(name), staged->second.memory, staged->second.bytes, stream_);
        }
      }
      if (!bound.context->enqueueV3(stream_)) {
        throw Error(ErrorKind::backend,
                    opened_->record.flavor + " could not run the engine; " + opened_->rebuild + " --overwrite");
      }
      for (const std::string& name : of.outputs) {
        const auto staged = bound.staging.find(name);
        if (staged == bound.staging.end()) continue;
        cuda_.download(staged->second.memory, bound.device.at(name), staged->second.bytes, stream_);
      }
    };
    if (!bound.graph && bound.runs == bound.capture_at) {
      const std::lock_guard<std::recursive_mutex> lock(device_mutex());
      bound.graph = is_capturable(*bound.context, stream_) ? cuda_.capture(stream_, frame) : nullptr;
      if (!bound.graph) bound.capture_at *= 2;
    }
    if (bound.graph) {
      cuda_.launch(bound.graph, stream_);
    } else {
      frame();
    }
  }

  // -- results ----------------------------------------------------------------------------------------------------------

  template <typename T>
  static std::vector<T> staged(const Bound& bound, const std::string& name) {
    const Bound::Staging& staging = bound.staging.at(name);
    std::vector<T> out(staging.bytes / sizeof(T));
    if (!out.empty()) std::memcpy(out.data(), staging.memory, out.size() * sizeof(T));
    return out;
  }

  std::vector<float> floats(const Bound& bound, const std::string& graph, const std::string& name) const {
    if (engine(graph).types.at(name) != nvinfer1::DataType::kFLOAT) {
      refuse(engine(graph).file() + " gives " + name + " in a type that no bundle has; " + opened_->rebuild + " --overwrite");
    }
    return staged<float>(bound, name);
  }

  std::vector<std::int64_t> integers(const Bound& bound, const std::string& graph, const std::string& name) const {
    const nvinfer1::DataType type = engine(graph).types.at(name);
#if GLIP_INTERFACE >= 1000
    if (type == nvinfer1::DataType::kINT64) return staged<std::int64_t>(bound, name);
#endif
    if (type == nvinfer1::DataType::kINT32) {
      const auto narrow = staged<std::int32_t>(bound, name);
      return {narrow.begin(), narrow.end()};
    }
    refuse(engine(graph).file() + " gives " + name + " in a type that no bundle has; " + opened_->rebuild + " --overwrite");
  }

  std::vector<Candidates> candidates(const Bound& bound, const std::string& graph, std::size_t count) const {
    const auto boxes = floats(bound, graph, "boxes"), scores = floats(bound, graph, "scores");
    const auto labels = integers(bound, graph, "labels");
    const auto batch = static_cast<std::size_t>(bound.shapes.at("scores")[0]), slots = scores.size() / batch;
    const auto part = [](const auto& values, std::size_t i, std::size_t size) {
      const auto begin = values.begin() + static_cast<std::ptrdiff_t>(i * size);
      return std::decay_t<decltype(values)>(begin, begin + static_cast<std::ptrdiff_t>(size));
    };
    std::vector<Candidates> out;
    for (std::size_t i = 0; i < count; ++i) {
      out.push_back({part(boxes, i, slots * 4), part(scores, i, slots), part(labels, i, slots)});
    }
    return out;
  }

  std::shared_ptr<Opened> opened_;
  const Cuda& cuda_;
  CUstream stream_ = nullptr;
  bool resizes_ = false;
  std::unique_ptr<Raw> raw_;
  mutable std::map<std::string, const Engine*> known_;
  std::map<bool, CUdeviceptr> memory_;  ///< what all contexts compute in, those of parts apart; only one runs at a time
  std::map<std::string, Kept> bound_;   ///< the last used first
};

}  // namespace
}  // namespace glip

extern "C" __attribute__((visibility("default"))) glip::Backend* glip_open_backend(const glip::Bundle& bundle,
                                                                                   const glip::BackendOptions& options) {
  return new glip::TensorRtBackend(std::make_shared<glip::Opened>(bundle, options, std::make_shared<glip::Cuda>()));
}
