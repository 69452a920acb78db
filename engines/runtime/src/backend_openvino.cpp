// OpenVINO on the CPU; glip_deploy/backends/openvino.py is the same in Python and says why.

#include <algorithm>
#include <cstdlib>
#include <mutex>
#include <openvino/frontend/onnx/extension/conversion.hpp>
#include <openvino/openvino.hpp>
#include <openvino/opsets/opset8.hpp>
#include <sstream>

#include "backend.hpp"
#include "cache.hpp"
#include "sha256.hpp"

namespace glip {
namespace {

namespace opset = ov::opset8;

constexpr int kOldest = 2026;
// Of the conversion below; as in Python.
const char* const kConversion = "1";

/// What OpenVINO says, without the places in its source code that come first.
std::string reason(const std::exception& error) {
  std::istringstream lines(error.what());
  std::string line, out;
  while (std::getline(lines, line)) {
    if (line.empty() || line.rfind("Exception from", 0) == 0 || line.rfind("Check '", 0) == 0) continue;
    out += (out.empty() ? "" : " ") + line;
  }
  return out.substr(0, 200);
}

/// A sample between the border of the map and the next pixel outside is interpolated with zero, as in ONNX.
ov::OutputVector deform_conv(const ov::frontend::NodeContext& node) {
  const auto inputs = node.get_input_size();
  const auto pads = node.get_attribute<std::vector<std::int64_t>>("pads", {0, 0, 0, 0});
  const auto strides = node.get_attribute<std::vector<std::int64_t>>("strides", {1, 1});
  const auto dilations = node.get_attribute<std::vector<std::int64_t>>("dilations", {1, 1});
  const auto group = node.get_attribute<std::int64_t>("group", 1);
  const auto offset_group = node.get_attribute<std::int64_t>("offset_group", 1);
  const auto wide = [](const std::vector<std::int64_t>& values) {
    return std::vector<std::size_t>(values.begin(), values.end());
  };
  const ov::CoordinateDiff begin(pads.begin(), pads.begin() + 2), end(pads.begin() + 2, pads.end());
  ov::Output<ov::Node> out;
  if (inputs > 4) {
    out = std::make_shared<opset::DeformableConvolution>(
        node.get_input(0), node.get_input(2), node.get_input(1), node.get_input(4), ov::Strides(wide(strides)), begin, end,
        ov::Strides(wide(dilations)), ov::op::PadType::EXPLICIT, group, offset_group, true);
  } else {
    out = std::make_shared<opset::DeformableConvolution>(node.get_input(0), node.get_input(2), node.get_input(1),
                                                         ov::Strides(wide(strides)), begin, end, ov::Strides(wide(dilations)),
                                                         ov::op::PadType::EXPLICIT, group, offset_group, true);
  }
  if (inputs > 3) {
    const auto shape = opset::Constant::create(ov::element::i64, {4}, {1, -1, 1, 1});
    out = std::make_shared<opset::Add>(out, std::make_shared<opset::Reshape>(node.get_input(3), shape, false));
  }
  return {out};
}

/// The process's core, which is never freed: the CPU plugin of a core sets the calling thread's signal stack and restores
/// the one before when it is freed, so that of two cores freed in another order the thread may keep one that is gone.
ov::Core& the_core() {
  static ov::Core* const core = [] {
    auto made = std::make_unique<ov::Core>();
    made->add_extension(std::make_shared<ov::frontend::onnx::ConversionExtension>("DeformConv", deform_conv));
    return made.release();
  }();
  return *core;
}

/// While it lives, oneDNN inside OpenVINO reads that it shall keep no kernels of shapes that are gone. It reads that once,
/// when the first graph is compiled. What the user has set stays.
class WithoutPrimitiveCache {
 public:
  WithoutPrimitiveCache() : ours_(std::getenv(kName) == nullptr) {
    if (ours_) setenv(kName, "0", 0);
  }
  ~WithoutPrimitiveCache() {
    if (ours_) unsetenv(kName);
  }
  WithoutPrimitiveCache(const WithoutPrimitiveCache&) = delete;
  WithoutPrimitiveCache& operator=(const WithoutPrimitiveCache&) = delete;

 private:
  static constexpr const char* kName = "ONEDNN_PRIMITIVE_CACHE_CAPACITY";
  bool ours_;
};

/// The compiled graphs of a bundle, which clones share.
class Graphs {
 public:
  Graphs(const Bundle& bundle, const BackendOptions& options)
      : bundle_(bundle), cache_(bundle.verified ? options.cache_folder : "") {
    const std::string version = ov::get_openvino_version().buildNumber;
    if (std::atoi(version.c_str()) < kOldest) {
      throw Error(ErrorKind::backend,
                  "OpenVINO " + version + " is too old; install " + std::to_string(kOldest) + ".0 or newer");
    }
    const auto known = core_.get_property("CPU", ov::device::capabilities);
    const bool native = std::find(known.begin(), known.end(), "BF16") != known.end();
    cpu_ = core_.get_property("CPU", ov::device::full_name);
    const std::string& wanted = options.precision;
    if (wanted != "f32" && wanted != "bf16" && wanted != "auto") {
      throw Error(ErrorKind::option, "precision is \"" + wanted + "\"; backend openvino takes f32, bf16, auto");
    }
    if (wanted == "bf16" && !native) {
      throw Error(ErrorKind::option,
                  "precision is \"bf16\"; this CPU (" + cpu_ + ") has no instructions for it: use f32 or auto");
    }
    precision = native && wanted != "f32" ? "bf16" : "f32";
    config_ = {{"INFERENCE_PRECISION_HINT", precision},
               {"PERFORMANCE_HINT", std::string("LATENCY")},
               {"NUM_STREAMS", 1},
               {"CPU_RUNTIME_CACHE_CAPACITY", 0}};
    if (options.threads > 0) config_["INFERENCE_NUM_THREADS"] = options.threads;
    image_ = compile("image.onnx");
  }

  ov::CompiledModel& text() {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (!text_) text_ = compile("text.onnx");
    return text_;
  }

  /// The image branch as a whole; empty once its parts are loaded.
  ov::CompiledModel image() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return image_;
  }

  /// The backbone and the head; empty where the bundle is not split. They replace the whole, so that no weight is in
  /// memory twice.
  std::pair<ov::CompiledModel, ov::CompiledModel> parts() {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (!head_ && bundle_.split) {
      image_ = {};  // first, so that its memory is free for the parts
      try {
        ov::CompiledModel backbone = compile("backbone.onnx");
        head_ = compile("head.onnx");
        backbone_ = backbone;
      } catch (...) {
        image_ = compile("image.onnx");
        throw;
      }
    }
    return {backbone_, head_};
  }

  std::string precision;

 private:
  ov::CompiledModel compile(const std::string& graph) {
    const std::string key = cache_.empty() ? "" : key_of(graph);
    const WithoutPrimitiveCache without;
    if (const auto known = read_compiled(cache_, key)) {
      try {
        std::istringstream stream(*known);
        return core_.import_model(stream, "CPU", config_);
      } catch (const std::exception&) {  // made by another build: compiled again, and written again
      }
    }
    const std::string file = bundle_.file(graph);
    std::shared_ptr<ov::Model> model;
    try {
      model = core_.read_model(file);
    } catch (const std::exception& error) {
      throw Error(ErrorKind::backend, "OpenVINO cannot load " + file + ": " + reason(error) + "; export the bundle again");
    }
    bundle_.check_unchanged();  // also before it is kept for others
    try {
      ov::CompiledModel compiled = core_.compile_model(model, "CPU", config_);
      if (!cache_.empty()) {
        std::ostringstream stream;
        compiled.export_model(stream);
        write_compiled(cache_, key, stream.str());
      }
      return compiled;
    } catch (const std::exception& error) {
      throw Error(ErrorKind::backend, "OpenVINO cannot compile " + file + ": " + reason(error));
    }
  }

  /// The key that Python gives the same graph, so that the two share it. The weights of the parts are the whole's.
  std::string key_of(const std::string& graph) const {
    std::string parts = std::string("glip\n") + kConversion + "\n" + ov::get_openvino_version().buildNumber + "\n" + cpu_;
    for (const auto& [name, value] : config_) parts += "\n" + name + "=" + value.as<std::string>();
    for (const auto& [name, hash] : bundle_.hashes) {
      const bool weights = (graph == "backbone.onnx" || graph == "head.onnx") && name.rfind("image.onnx.", 0) == 0;
      if (weights || name.rfind(graph, 0) == 0) parts += "\n" + name + " " + hash;
    }
    return sha256_hex(parts);
  }

  Bundle bundle_;
  std::string cache_, cpu_;
  ov::Core& core_ = the_core();
  ov::AnyMap config_;
  std::mutex mutex_;
  ov::CompiledModel text_, image_, backbone_, head_;
};

template <typename T>
ov::Tensor view(ov::element::Type type, const ov::Shape& shape, const std::vector<T>& values) {
  return ov::Tensor(type, shape, const_cast<T*>(values.data()));  // an input, which is only read
}

/// The part of a tensor that belongs to one of the pictures of a batch.
template <typename T>
std::vector<T> part(const ov::Tensor& tensor, std::size_t picture, std::size_t pictures) {
  const std::size_t size = tensor.get_size() / pictures;
  const T* data = tensor.data<T>() + picture * size;
  return std::vector<T>(data, data + size);
}

std::vector<float> repeated(const std::vector<float>& values, std::size_t times) {
  std::vector<float> out;
  out.reserve(values.size() * times);
  for (std::size_t i = 0; i < times; ++i) out.insert(out.end(), values.begin(), values.end());
  return out;
}

class OpenVINOBackend : public Backend {
 public:
  explicit OpenVINOBackend(std::shared_ptr<Graphs> graphs) : graphs_(std::move(graphs)) {}

  std::vector<float> encode_text(const std::vector<std::int64_t>& ids) override {
    const std::vector<std::int64_t> ones(ids.size(), 1);
    const ov::Shape shape{1, ids.size()};
    return guarded([&] {
      if (!text_) text_ = graphs_->text().create_infer_request();
      text_.set_tensor("input_ids", view(ov::element::i64, shape, ids));
      text_.set_tensor("attention_mask", view(ov::element::i64, shape, ones));
      text_.infer();
      return part<float>(text_.get_tensor("text_embedding"), 0, 1);
    });
  }

  std::vector<std::vector<Candidates>> detect(const Canvas& canvas, const std::vector<PromptInput>& prompts) override {
    const std::size_t batch = canvas.pictures.size();
    const auto height = static_cast<std::size_t>(canvas.canvas.height), width = static_cast<std::size_t>(canvas.canvas.width);
    std::vector<std::int64_t> sizes;
    for (const Size& picture : canvas.pictures) sizes.insert(sizes.end(), {picture.height, picture.width});
    const ov::Tensor frames = view(ov::element::u8, {batch, height, width, 3}, canvas.pixels);
    const ov::Tensor image_sizes = view(ov::element::i64, {batch, 2}, sizes);
    return guarded([&] {
      const bool parts = choose_parts(prompts.size());
      if (parts) {
        backbone_.set_tensor("frames", frames);
        backbone_.set_tensor("image_sizes", image_sizes);
        backbone_.infer();
        for (const std::string& name : features_) image_.set_tensor(name, backbone_.get_tensor(name));
      } else {
        image_.set_tensor("frames", frames);
      }
      image_.set_tensor("image_sizes", image_sizes);
      std::vector<std::vector<Candidates>> out;
      out.reserve(prompts.size());
      for (const PromptInput& prompt : prompts) out.push_back(run(prompt, batch));
      return out;
    });
  }

  std::unique_ptr<Backend> clone() const override { return std::make_unique<OpenVINOBackend>(graphs_); }

  std::string text_key() const override { return graphs_->precision == "f32" ? "" : "openvino-" + graphs_->precision; }

 private:
  template <typename Run>
  auto guarded(Run run) -> decltype(run()) {
    try {
      return run();
    } catch (const Error&) {
      throw;
    } catch (const std::bad_alloc&) {
      throw;
    } catch (const std::exception& error) {
      throw Error(ErrorKind::backend, "OpenVINO failed: " + reason(error));
    }
  }

  /// Make the requests of what is run for so many prompts, and say whether that is the two parts.
  bool choose_parts(std::size_t prompts) {
    if (!backbone_) {
      const ov::CompiledModel whole = prompts == 1 ? graphs_->image() : ov::CompiledModel();
      if (!whole) {
        auto [backbone, head] = graphs_->parts();
        if (head) {
          image_ = {};
          features_.clear();
          for (const auto& output : backbone.outputs()) features_.push_back(output.get_any_name());
          image_ = head.create_infer_request();
          backbone_ = backbone.create_infer_request();
        }
      }
    }
    if (!backbone_ && !image_) image_ = graphs_->image().create_infer_request();
    return static_cast<bool>(backbone_);
  }

  /// Run the whole, or the head, for a prompt, after what belongs to the pictures is set.
  std::vector<Candidates> run(const PromptInput& prompt, std::size_t batch) {
    const std::size_t tokens = prompt.tokens, width = prompt.embedding.size() / tokens;
    const std::vector<std::int64_t> mask(batch * tokens, 1);
    std::vector<float> embeddings, maps;
    if (batch > 1) {
      embeddings = repeated(prompt.embedding, batch);
      maps = repeated(prompt.class_map, batch);
    }
    const auto& embedding = batch > 1 ? embeddings : prompt.embedding;
    const auto& map = batch > 1 ? maps : prompt.class_map;
    image_.set_tensor("text_embedding", view(ov::element::f32, {batch, tokens, width}, embedding));
    image_.set_tensor("text_mask", view(ov::element::i64, {batch, tokens}, mask));
    image_.set_tensor("class_map", view(ov::element::f32, {batch, prompt.classes, tokens}, map));
    image_.infer();
    const ov::Tensor boxes = image_.get_tensor("boxes"), scores = image_.get_tensor("scores"),
                     labels = image_.get_tensor("labels");
    std::vector<Candidates> out;
    for (std::size_t i = 0; i < batch; ++i) {
      out.push_back({part<float>(boxes, i, batch), part<float>(scores, i, batch), part<std::int64_t>(labels, i, batch)});
    }
    return out;
  }

  std::shared_ptr<Graphs> graphs_;
  ov::InferRequest text_, image_, backbone_;  // image_: of the whole, or of the head where there is backbone_
  std::vector<std::string> features_;
};

}  // namespace
}  // namespace glip

extern "C" __attribute__((visibility("default"))) glip::Backend* glip_open_backend(const glip::Bundle& bundle,
                                                                                   const glip::BackendOptions& options) {
  try {
    return new glip::OpenVINOBackend(std::make_shared<glip::Graphs>(bundle, options));
  } catch (const glip::Error&) {
    throw;
  } catch (const std::bad_alloc&) {
    throw;
  } catch (const std::exception& error) {
    throw glip::Error(glip::ErrorKind::backend, "OpenVINO cannot start: " + glip::reason(error));
  }
}
