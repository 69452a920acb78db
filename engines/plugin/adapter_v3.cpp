// The plugin for TensorRT 10 and up, and TensorRT-RTX: glip::ModulatedDeformConv version 3 as an IPluginV3.
//
// Load it with registry.load_library; it links against no TensorRT library.
#include <exception>
#include <memory>

#include "adapter_common.h"

namespace {

using namespace nvinfer1;

class DeformPlugin final : public IPluginV3,
                           public IPluginV3OneCore,
                           public IPluginV3OneBuild,
                           public IPluginV3OneRuntime {
 public:
  explicit DeformPlugin(const glip::Attributes& attributes) : fields_(attributes) {
    for (const auto& slot : fields_.attributes.slots()) {
      timing_id_ += std::string(timing_id_.empty() ? "" : ";") + slot.name + "=";
      for (int i = 0; i < slot.count; ++i) timing_id_ += (i ? "," : "") + std::to_string(slot.values[i]);
    }
  }

  // IPluginV3
  IPluginCapability* getCapabilityInterface(PluginCapabilityType type) noexcept override {
    switch (type) {
      case PluginCapabilityType::kCORE: return static_cast<IPluginV3OneCore*>(this);
      case PluginCapabilityType::kBUILD: return static_cast<IPluginV3OneBuild*>(this);
      case PluginCapabilityType::kRUNTIME: return static_cast<IPluginV3OneRuntime*>(this);
    }
    return nullptr;
  }
  IPluginV3* clone() noexcept override { return copy(); }

  // IPluginV3OneCore
  AsciiChar const* getPluginName() const noexcept override { return glip::kName; }
  AsciiChar const* getPluginVersion() const noexcept override { return glip::kVersion; }
  AsciiChar const* getPluginNamespace() const noexcept override { return glip::kNamespace; }

  // IPluginV3OneBuild
  int32_t getNbOutputs() const noexcept override { return 1; }

  int32_t getOutputDataTypes(DataType* outputTypes, int32_t nbOutputs, DataType const* inputTypes,
                             int32_t nbInputs) const noexcept override {
    if (nbOutputs != 1 || nbInputs < glip::kMinInputs) return fail("X, W, B and a map are needed, and one output");
    outputTypes[0] = inputTypes[glip::kX];
    return 0;
  }

  int32_t getOutputShapes(DimsExprs const* inputs, int32_t nbInputs, DimsExprs const*, int32_t, DimsExprs* outputs,
                          int32_t nbOutputs, IExprBuilder& builder) noexcept override {
    if (nbOutputs != 1 || nbInputs < glip::kMinInputs) return fail("X, W, B and a map are needed, and one output");
    if (inputs[glip::kX].nbDims != 3 || inputs[glip::kPositions].nbDims != 4)
      return fail("X has three sides and a map four");
    outputs[0] = glip::output_dims(fields_.attributes, inputs, builder);
    return 0;
  }

  bool supportsFormatCombination(int32_t pos, DynamicPluginTensorDesc const* inOut, int32_t nbInputs,
                                 int32_t nbOutputs) noexcept override {
    if (nbInputs < glip::kMinInputs || nbInputs > glip::kMaxInputs || nbOutputs != 1) return false;
    PluginTensorDesc tensors[glip::kMaxInputs + 1]{};
    for (int i = 0; i <= pos; ++i) tensors[i] = inOut[i].desc;
    return glip::format_is_supported(pos, tensors, nbInputs);
  }

  int32_t configurePlugin(DynamicPluginTensorDesc const* in, int32_t nbInputs, DynamicPluginTensorDesc const*,
                          int32_t) noexcept override {
    Dims dims[glip::kMaxInputs]{};
    for (int i = 0; i < nbInputs && i < glip::kMaxInputs; ++i) dims[i] = in[i].desc.dims;
    const std::string error = glip::shape_error(fields_.attributes, dims, nbInputs);
    return error.empty() ? 0 : fail(error);
  }

  size_t getWorkspaceSize(DynamicPluginTensorDesc const*, int32_t, DynamicPluginTensorDesc const*,
                          int32_t) const noexcept override {
    return 0;
  }

  // Lets layers with equal attributes, types and shapes share their timings, in one build and through a timing cache.
  char const* getTimingCacheID() noexcept override { return timing_id_.c_str(); }

  // IPluginV3OneRuntime
  int32_t onShapeChange(PluginTensorDesc const* in, int32_t nbInputs, PluginTensorDesc const*,
                        int32_t) noexcept override {
    Dims dims[glip::kMaxInputs]{};
    for (int i = 0; i < nbInputs && i < glip::kMaxInputs; ++i) dims[i] = in[i].dims;
    inputs_ = nbInputs;
    const std::string error = glip::shape_error(fields_.attributes, dims, nbInputs);
    return error.empty() ? 0 : fail(error);
  }

  int32_t enqueue(PluginTensorDesc const* inputDesc, PluginTensorDesc const*, void const* const* inputs,
                  void* const* outputs, void*, cudaStream_t stream) noexcept override {
    return glip::run(fields_.attributes, inputDesc, inputs_, inputs, outputs[0], stream);
  }

  IPluginV3* attachToContext(IPluginResourceContext*) noexcept override { return copy(); }
  PluginFieldCollection const* getFieldsToSerialize() noexcept override { return &fields_.collection; }

 private:
  static int32_t fail(const std::string& message) {
    glip::log_error(message);
    return -1;
  }

  DeformPlugin* copy() const noexcept {
    auto* plugin = new (std::nothrow) DeformPlugin(fields_.attributes);
    if (plugin) plugin->inputs_ = inputs_;
    return plugin;
  }

  glip::Fields fields_;
  std::string timing_id_;
  int inputs_ = glip::kMinInputs;  // enqueue does not get it
};

class DeformCreator final : public IPluginCreatorV3One {
 public:
  IPluginV3* createPlugin(AsciiChar const* name, PluginFieldCollection const* fc, TensorRTPhase) noexcept override {
    glip::Attributes attributes;
    const std::string error = glip::parse_attributes(fc, &attributes);
    if (!error.empty()) {
      glip::log_error(std::string("node ") + (name ? name : "?") + ": " + error);
      return nullptr;
    }
    return new (std::nothrow) DeformPlugin(attributes);
  }
  PluginFieldCollection const* getFieldNames() noexcept override { return &fields_.collection; }
  AsciiChar const* getPluginName() const noexcept override { return glip::kName; }
  AsciiChar const* getPluginVersion() const noexcept override { return glip::kVersion; }
  AsciiChar const* getPluginNamespace() const noexcept override { return glip::kNamespace; }

 private:
  glip::Fields fields_{glip::Attributes{}};
};

}  // namespace

extern "C" GLIP_DEFORM_API nvinfer1::IPluginCreatorInterface* const* getCreators(int32_t& nbCreators) {
  static DeformCreator creator;
  static nvinfer1::IPluginCreatorInterface* const creators[] = {&creator};
  nbCreators = 1;
  return creators;
}

// TensorRT looks for this function when it loads the library; `loaded_logger` says why the finder is not kept.
extern "C" GLIP_DEFORM_API void setLoggerFinder(void*) {}
