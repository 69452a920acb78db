// The plugin for TensorRT 8.6: glip::ModulatedDeformConv version 3 as an IPluginV2DynamicExt.
//
// Load it with registry.load_library; it links against no TensorRT library.
#include <memory>
#include <new>

#include "adapter_common.h"

namespace {

using namespace nvinfer1;

constexpr std::int32_t kIntegers = 15;  // serialized: the attributes, and how many inputs there are

class DeformPlugin final : public IPluginV2DynamicExt {
 public:
  explicit DeformPlugin(const glip::Attributes& attributes) : attributes_(attributes) {}

  // IPluginV2
  AsciiChar const* getPluginType() const noexcept override { return glip::kName; }
  AsciiChar const* getPluginVersion() const noexcept override { return glip::kVersion; }
  AsciiChar const* getPluginNamespace() const noexcept override { return namespace_.c_str(); }
  void setPluginNamespace(AsciiChar const* name) noexcept override { namespace_ = name; }
  int32_t getNbOutputs() const noexcept override { return 1; }
  int32_t initialize() noexcept override { return 0; }
  void terminate() noexcept override {}
  void destroy() noexcept override { delete this; }

  size_t getSerializationSize() const noexcept override { return kIntegers * sizeof(std::int32_t); }
  void serialize(void* buffer) const noexcept override {
    glip::Attributes copy = attributes_;
    auto* to = static_cast<unsigned char*>(buffer);
    for (const auto& slot : copy.slots()) {
      std::memcpy(to, slot.values, slot.count * sizeof(int));
      to += slot.count * sizeof(int);
    }
    std::memcpy(to, &inputs_, sizeof(int));
  }

  // IPluginV2Ext
  DataType getOutputDataType(int32_t, DataType const* inputTypes, int32_t) const noexcept override {
    return inputTypes[glip::kX];
  }

  // IPluginV2DynamicExt
  IPluginV2DynamicExt* clone() const noexcept override {
    auto* plugin = new (std::nothrow) DeformPlugin(attributes_);
    if (!plugin) return nullptr;
    plugin->namespace_ = namespace_;
    plugin->inputs_ = inputs_;
    return plugin;
  }

  DimsExprs getOutputDimensions(int32_t, DimsExprs const* inputs, int32_t, IExprBuilder& builder) noexcept override {
    return glip::output_dims(attributes_, inputs, builder);
  }

  bool supportsFormatCombination(int32_t pos, PluginTensorDesc const* inOut, int32_t nbInputs,
                                 int32_t nbOutputs) noexcept override {
    if (nbInputs < glip::kMinInputs || nbInputs > glip::kMaxInputs || nbOutputs != 1) return false;
    return glip::format_is_supported(pos, inOut, nbInputs);
  }

  // Cannot fail by its signature: a wrong shape is logged here, and stops the build by the workspace's size.
  void configurePlugin(DynamicPluginTensorDesc const* in, int32_t nbInputs, DynamicPluginTensorDesc const*,
                       int32_t) noexcept override {
    Dims dims[glip::kMaxInputs]{};
    for (int i = 0; i < nbInputs && i < glip::kMaxInputs; ++i) dims[i] = in[i].desc.dims;
    inputs_ = nbInputs;
    const std::string error = glip::shape_error(attributes_, dims, nbInputs);
    wrong_ = !error.empty();
    if (wrong_) glip::log_error(error);
  }

  size_t getWorkspaceSize(PluginTensorDesc const*, int32_t, PluginTensorDesc const*, int32_t) const noexcept override {
    return wrong_ ? static_cast<size_t>(-1) / 2 : 0;
  }

  int32_t enqueue(PluginTensorDesc const* inputDesc, PluginTensorDesc const*, void const* const* inputs,
                  void* const* outputs, void*, cudaStream_t stream) noexcept override {
    return glip::run(attributes_, inputDesc, inputs_, inputs, outputs[0], stream);
  }

 private:
  friend class DeformCreator;

  glip::Attributes attributes_;
  std::string namespace_ = glip::kNamespace;
  int inputs_ = glip::kMinInputs;  // enqueue does not get it
  bool wrong_ = false;
};

class DeformCreator final : public IPluginCreator {
 public:
  AsciiChar const* getPluginName() const noexcept override { return glip::kName; }
  AsciiChar const* getPluginVersion() const noexcept override { return glip::kVersion; }
  AsciiChar const* getPluginNamespace() const noexcept override { return namespace_.c_str(); }
  void setPluginNamespace(AsciiChar const* name) noexcept override { namespace_ = name; }
  PluginFieldCollection const* getFieldNames() noexcept override { return &fields_.collection; }

  IPluginV2* createPlugin(AsciiChar const* name, PluginFieldCollection const* fc) noexcept override {
    glip::Attributes attributes;
    const std::string error = glip::parse_attributes(fc, &attributes);
    return finish(name, error, attributes);
  }

  IPluginV2* deserializePlugin(AsciiChar const* name, void const* data, size_t length) noexcept override {
    glip::Attributes attributes;
    if (length != kIntegers * sizeof(std::int32_t))
      return finish(name, "serialized by another version; build the engine again", attributes);
    auto* from = static_cast<const unsigned char*>(data);
    for (const auto& slot : attributes.slots()) {
      std::memcpy(slot.values, from, slot.count * sizeof(int));
      from += slot.count * sizeof(int);
    }
    auto* plugin = finish(name, glip::attribute_error(attributes), attributes);
    if (plugin) std::memcpy(&plugin->inputs_, from, sizeof(int));
    return plugin;
  }

 private:
  DeformPlugin* finish(AsciiChar const* name, const std::string& error, const glip::Attributes& attributes) {
    if (error.empty()) return new (std::nothrow) DeformPlugin(attributes);
    glip::log_error(std::string("node ") + (name ? name : "?") + ": " + error);
    return nullptr;
  }

  std::string namespace_ = glip::kNamespace;
  glip::Fields fields_{glip::Attributes{}};
};

}  // namespace

extern "C" GLIP_DEFORM_API nvinfer1::IPluginCreator* const* getPluginCreators(int32_t& nbCreators) {
  static DeformCreator creator;
  static nvinfer1::IPluginCreator* const creators[] = {&creator};
  nbCreators = 1;
  return creators;
}

// TensorRT looks for this function when it loads the library; `loaded_logger` says why the finder is not kept.
extern "C" GLIP_DEFORM_API void setLoggerFinder(void*) {}
