// OpenVINO on the CPU; glip_deploy/backends/openvino.py is the same in Python and says why.

#include <algorithm>
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
    out = std::make_shared<opset::DeformableConvolution>(
        node.get_input(0), node.get_input(2), node.get_input(1), ov::Strides(wide(strides)), begin, end,
        ov::Strides(wide(dilations)), ov::op::PadType::EXPLICIT, group, offset_group, true);
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

/// The compiled graphs of a bundle, which clones share.
class Graphs {
 public:
  Graphs(const Bundle& bundle, const BackendOptions& options)
      : bundle_(bundle), cache_(bundle.verified ? options.cache_folder : "") {
    const std::string version = ov::get_openvino_version().buildNumber;
    if (std::atoi(version.c_str()) < kOldest) {
      throw Error(ErrorKind::backend, "OpenVINO " + version + " is too old; install " + std::to_string(kOldest) + ".0 or newer");
    }
    const auto known = core_.get_property("CPU", ov::device::capabilities);
    const bool native = std::find(known.begin(), known.end(), "BF16") != known.end();
    cpu_ = core_.get_property("CPU", ov::device::full_name);
    const std::string& wanted = options.precision;
    if (wanted != "f32" && wanted != "bf16" && wanted != "auto") {
      throw Error(ErrorKind::option, "precision is \"" + wanted + "\"; backend openvino takes f32, bf16, auto");
    }
    if (wanted == "bf16" && !native) {
      throw Error(ErrorKind::option, "precision is \"bf16\"; this CPU (" + cpu_ +
                                         ") has no instructions for it: use f32 or auto");
    }
    precision = native && wanted != "f32" ? "bf16" : "f32";
    config_ = {{"INFERENCE_PRECISION_HINT", precision}, {"PERFORMANCE_HINT", std::string("LATENCY")}, {"NUM_STREAMS", 1}};
    if (options.threads > 0) config_["INFERENCE_NUM_THREADS"] = options.threads;
    image = compile("image.onnx");
  }

  ov::CompiledModel& text() {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (!text_) text_ = compile("text.onnx");
    return text_;
  }

  std::string precision;
  ov::CompiledModel image;

 private:
  ov::CompiledModel compile(const std::string& graph) {
    const std::string key = cache_.empty() ? "" : key_of(graph);
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

  /// The key that Python gives the same graph, so that the two share it.
  std::string key_of(const std::string& graph) const {
    std::string parts = std::string("glip\n") + kConversion + "\n" + ov::get_openvino_version().buildNumber + "\n" + cpu_;
    for (const auto& [name, value] : config_) parts += "\n" + name + "=" + value.as<std::string>();
    for (const auto& [name, hash] : bundle_.hashes) {
      if (name.rfind(graph, 0) == 0) parts += "\n" + name + " " + hash;
    }
    return sha256_hex(parts);
  }

  Bundle bundle_;
  std::string cache_, cpu_;
  ov::Core& core_ = the_core();
  ov::AnyMap config_;
  std::mutex mutex_;
  ov::CompiledModel text_;
};

template <typename T>
ov::Tensor view(ov::element::Type type, const ov::Shape& shape, const std::vector<T>& values) {
  return ov::Tensor(type, shape, const_cast<T*>(values.data()));  // an input, which is only read
}

template <typename T>
std::vector<T> copy(const ov::Tensor& tensor) {
  const T* data = tensor.data<T>();
  return std::vector<T>(data, data + tensor.get_size());
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
      return copy<float>(text_.get_tensor("text_embedding"));
    });
  }

  Candidates detect(const Canvas& canvas, const std::vector<float>& embedding, const std::vector<float>& map,
                    std::size_t tokens) override {
    const std::vector<std::int64_t> mask(tokens, 1), size{canvas.picture.height, canvas.picture.width};
    const auto height = static_cast<std::size_t>(canvas.canvas.height), width = static_cast<std::size_t>(canvas.canvas.width);
    return guarded([&] {
      if (!image_) image_ = graphs_->image.create_infer_request();
      image_.set_tensor("frames", view(ov::element::u8, {1, height, width, 3}, canvas.pixels));
      image_.set_tensor("image_sizes", view(ov::element::i64, {1, 2}, size));
      image_.set_tensor("text_embedding", view(ov::element::f32, {1, tokens, embedding.size() / tokens}, embedding));
      image_.set_tensor("text_mask", view(ov::element::i64, {1, tokens}, mask));
      image_.set_tensor("class_map", view(ov::element::f32, {1, map.size() / tokens, tokens}, map));
      image_.infer();
      return Candidates{copy<float>(image_.get_tensor("boxes")), copy<float>(image_.get_tensor("scores")),
                        copy<std::int64_t>(image_.get_tensor("labels"))};
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

  std::shared_ptr<Graphs> graphs_;
  ov::InferRequest text_, image_;
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
