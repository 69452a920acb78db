// What both TensorRT adapters share: messages, attributes from fields, problems from tensor descriptions, running them.
#pragma once

#include <NvInfer.h>
#include <dlfcn.h>
#include <link.h>

#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

#include "deform_math.h"

namespace glip {

constexpr char kName[] = "ModulatedDeformConv";
constexpr char kVersion[] = "2";
constexpr char kNamespace[] = "glip";

// Inputs, in the order of ONNX DeformConv. Bias and mask may be left out from the end. Weights are packed already, as
// glip_deform_pack_weights does it: (taps, padded input channels, padded output channels).
enum Input { kX = 0, kWeight = 1, kOffset = 2, kBias = 3, kMask = 4 };
constexpr int kMinInputs = 3, kMaxInputs = 5;

// -- messages -------------------------------------------------------------------------------------------------------

// The logger of the TensorRT that is loaded. getLogger() cannot be linked against without choosing one of TensorRT's
// libraries, and an ILoggerFinder cannot be asked: its table of functions changed in TensorRT 11, while one build of
// this file serves 10 and 11.
inline nvinfer1::ILogger* loaded_logger() {
  std::string path;
  dl_iterate_phdr(
      [](dl_phdr_info* library, std::size_t, void* found) {
        const char* name = library->dlpi_name ? library->dlpi_name : "";
        if (!std::strstr(name, "libnvinfer.so") && !std::strstr(name, "libtensorrt_rtx.so")) return 0;
        *static_cast<std::string*>(found) = name;
        return 1;
      },
      &path);
  void* library = path.empty() ? nullptr : dlopen(path.c_str(), RTLD_LAZY | RTLD_NOLOAD);
  if (!library) return nullptr;
  auto* get = reinterpret_cast<nvinfer1::ILogger* (*)() noexcept>(dlsym(library, "getLogger"));
  nvinfer1::ILogger* logger = get ? get() : nullptr;
  dlclose(library);  // it stays loaded: RTLD_NOLOAD only counted a reference
  return logger;
}

inline void log_error(const std::string& message) {
  const std::string line = std::string(kNamespace) + "::" + kName + ": " + message;
  if (nvinfer1::ILogger* logger = loaded_logger()) logger->log(nvinfer1::ILogger::Severity::kERROR, line.c_str());
  std::fprintf(stderr, "%s\n", line.c_str());  // the logger of TensorRT-RTX 1.7 drops messages
}

// -- attributes -----------------------------------------------------------------------------------------------------

// The attributes of ONNX DeformConv, by the names they have there, and the output channels before padding.
struct Attributes {
  int kernel_shape[2] = {0, 0};  // needed, as packed weights do not tell it
  int out_channels = 0;          // likewise
  int strides[2] = {1, 1};
  int pads[4] = {0, 0, 0, 0};  // top, left, bottom, right
  int dilations[2] = {1, 1};
  int group = 1;
  int offset_group = 1;

  struct Slot {
    const char* name;
    int* values;
    int count;
  };
  std::vector<Slot> slots() {
    return {{"kernel_shape", kernel_shape, 2}, {"out_channels", &out_channels, 1}, {"strides", strides, 2},
            {"pads", pads, 4},                 {"dilations", dilations, 2},        {"group", &group, 1},
            {"offset_group", &offset_group, 1}};
  }
};

inline bool read_integers(const nvinfer1::PluginField& field, int* values) {
  for (int i = 0; i < field.length; ++i) {
    if (field.type == nvinfer1::PluginFieldType::kINT32)
      values[i] = static_cast<const std::int32_t*>(field.data)[i];
#if NV_TENSORRT_MAJOR >= 10
    else if (field.type == nvinfer1::PluginFieldType::kINT64)
      values[i] = static_cast<int>(static_cast<const std::int64_t*>(field.data)[i]);
#endif
    else
      return false;
  }
  return true;
}

// Returns what is wrong with attributes, or an empty string.
inline std::string attribute_error(const Attributes& a) {
  if (a.group != 1) return "group is " + std::to_string(a.group) + "; only 1 is supported";
  if (a.offset_group != 1) return "offset_group is " + std::to_string(a.offset_group) + "; only 1 is supported";
  for (int i = 0; i < 2; ++i) {
    if (a.strides[i] < 1) return "strides has " + std::to_string(a.strides[i]) + "; at least 1 is supported";
    if (a.dilations[i] < 1) return "dilations has " + std::to_string(a.dilations[i]) + "; at least 1 is supported";
  }
  for (const int pad : a.pads)
    if (pad < 0) return "pads has " + std::to_string(pad) + "; at least 0 is supported";
  const int taps = a.kernel_shape[0] * a.kernel_shape[1];
  if (a.kernel_shape[0] < 1 || taps < 1 || taps > GLIP_DEFORM_MAX_TAPS)
    return "kernel_shape is " + std::to_string(a.kernel_shape[0]) + "x" + std::to_string(a.kernel_shape[1]) +
           "; 1 to 9 taps are supported";
  if (a.out_channels < 1) return "out_channels is " + std::to_string(a.out_channels) + "; at least 1 is supported";
  return "";
}

// Reads fields; absent ones keep their defaults, unknown ones are ignored. Returns what is wrong, or an empty string.
inline std::string parse_attributes(const nvinfer1::PluginFieldCollection* fields, Attributes* attributes) {
  for (int i = 0; fields && i < fields->nbFields; ++i) {
    const nvinfer1::PluginField& field = fields->fields[i];
    for (const Attributes::Slot& slot : attributes->slots()) {
      if (!field.name || std::strcmp(field.name, slot.name)) continue;
      if (field.length == 0) continue;
      if (field.length != slot.count || !field.data || !read_integers(field, slot.values))
        return std::string(slot.name) + " is not " + std::to_string(slot.count) + " integers";
    }
  }
  return attribute_error(*attributes);
}

// Attributes as fields, for a creator's list of names and for serialization. Owns what it points to.
struct Fields {
  Attributes attributes;
  std::vector<nvinfer1::PluginField> list;
  nvinfer1::PluginFieldCollection collection{};

  explicit Fields(const Attributes& given) : attributes(given) {
    for (const Attributes::Slot& slot : attributes.slots())
      list.emplace_back(slot.name, slot.values, nvinfer1::PluginFieldType::kINT32, slot.count);
    collection.nbFields = static_cast<int>(list.size());
    collection.fields = list.data();
  }
  Fields(const Fields&) = delete;
  Fields& operator=(const Fields&) = delete;
};

// -- formats --------------------------------------------------------------------------------------------------------

// Returns the C interface's number for a data type, or -1.
inline int data_type(nvinfer1::DataType type) {
  switch (type) {
    case nvinfer1::DataType::kFLOAT: return GLIP_DEFORM_F32;
    case nvinfer1::DataType::kHALF: return GLIP_DEFORM_F16;
#if NV_TENSORRT_MAJOR >= 10
    case nvinfer1::DataType::kBF16: return GLIP_DEFORM_BF16;
#endif
    default: return -1;
  }
}

// Whether tensor `position`, inputs first and then the output, may have its type and format, given those before it.
inline bool format_is_supported(int position, const nvinfer1::PluginTensorDesc* tensors, int inputs) {
  const nvinfer1::PluginTensorDesc& here = tensors[position];
  const nvinfer1::DataType data = tensors[kX].type;
  const bool linear = here.format == nvinfer1::TensorFormat::kLINEAR;
  // Channels-last pixels that need no padding: what a padded channel holds is not specified.
  const bool last = here.format == nvinfer1::TensorFormat::kHWC8 && data_type(data) > GLIP_DEFORM_F32 &&
                    here.dims.nbDims == 4 && here.dims.d[1] > 0 && here.dims.d[1] % 8 == 0;
  if (position == kX) return data_type(data) >= 0 && (linear || last);
  if (position == inputs) return here.type == data && (linear || last);
  // Never in half precision, even where the builder may choose (8.6): positions would be off by 1/16 pixel and more.
  if (position == kOffset || position == kMask) return linear && here.type == nvinfer1::DataType::kFLOAT;
  return linear && here.type == data;
}

// -- running --------------------------------------------------------------------------------------------------------

inline std::string dims_text(const nvinfer1::Dims& dims) {
  std::string text;
  for (int i = 0; i < dims.nbDims; ++i) text += (i ? "x" : "") + std::to_string(dims.d[i]);
  return text;
}

// Returns what is wrong with the shapes of a node's inputs, or an empty string; a side of -1 is not known yet.
inline std::string shape_error(const Attributes& a, const nvinfer1::Dims* dims, int inputs) {
  if (inputs < kMinInputs || inputs > kMaxInputs)
    return std::to_string(inputs) + " inputs; X, W, offset and at most B, mask are supported";
  for (const int i : {kX, kOffset})
    if (dims[i].nbDims != 4)
      return "input " + std::to_string(i) + " has shape " + dims_text(dims[i]) + ", not four sides";
  const nvinfer1::Dims &x = dims[kX], &w = dims[kWeight];
  const int taps = a.kernel_shape[0] * a.kernel_shape[1];
  const auto differs = [](auto given, auto wanted) { return given >= 0 && given != wanted; };
  const int padded_in = x.d[1] < 0 ? -1 : round_up(static_cast<int>(x.d[1]), kChannelStep);
  const int padded_out = round_up(a.out_channels, kOutputStep);
  if (w.nbDims != 3 || w.d[0] != taps || differs(padded_in, w.d[1]) || w.d[2] != padded_out)
    return "W has shape " + dims_text(w) + "; packed for X of shape " + dims_text(x) + " it is " +
           std::to_string(taps) + "x" + std::to_string(padded_in) + "x" + std::to_string(padded_out);
  if (differs(dims[kOffset].d[1], 2 * taps))
    return "offset has shape " + dims_text(dims[kOffset]) + "; channels are 2 x taps, offset_group 1 only";
  if (inputs > kBias && (dims[kBias].nbDims != 1 || differs(dims[kBias].d[0], a.out_channels)))
    return "B has shape " + dims_text(dims[kBias]) + ", not one number for each of the out_channels";
  if (inputs > kMask && (dims[kMask].nbDims != 4 || differs(dims[kMask].d[1], taps)))
    return "mask has shape " + dims_text(dims[kMask]) + "; channels are taps, offset_group 1 only";
  return "";
}

// Returns a node's problem without its buffers; all sides must be known.
inline GlipDeformProblem make_problem(const Attributes& a, const nvinfer1::PluginTensorDesc* in,
                                      const nvinfer1::PluginTensorDesc& out) {
  const auto side = [](const nvinfer1::PluginTensorDesc& tensor, int i) { return static_cast<int>(tensor.dims.d[i]); };
  const auto layout = [](const nvinfer1::PluginTensorDesc& tensor) {
    return tensor.format == nvinfer1::TensorFormat::kLINEAR ? GLIP_DEFORM_NCHW : GLIP_DEFORM_NHWC;
  };
  GlipDeformProblem p{};
  p.batch = side(in[kX], 0);
  p.in_channels = side(in[kX], 1);
  p.out_channels = a.out_channels;
  p.kernel_height = a.kernel_shape[0];
  p.kernel_width = a.kernel_shape[1];
  p.stride_height = a.strides[0];
  p.stride_width = a.strides[1];
  p.pad_top = a.pads[0];
  p.pad_left = a.pads[1];
  p.dilation_height = a.dilations[0];
  p.dilation_width = a.dilations[1];
  p.data_type = data_type(in[kX].type);
  p.position_type = data_type(in[kOffset].type);
  p.x_layout = layout(in[kX]);
  p.y_layout = layout(out);
  p.num_levels = 1;
  p.levels[0].height = side(in[kX], 2);
  p.levels[0].width = side(in[kX], 3);
  p.levels[0].out_height = side(in[kOffset], 2);
  p.levels[0].out_width = side(in[kOffset], 3);
  return p;
}

// Enqueues a node; returns 0 for success.
inline int run(const Attributes& a, const nvinfer1::PluginTensorDesc* in, int inputs,
               const nvinfer1::PluginTensorDesc& out, const void* const* buffers, void* result, void* workspace,
               void* stream) {
  GlipDeformProblem p = make_problem(a, in, out);
  if (const char* error = glip_deform_problem_error(&p)) {
    log_error(error);
    return 1;
  }
  p.weight = buffers[kWeight];
  p.bias = inputs > kBias ? buffers[kBias] : nullptr;
  p.levels[0].x = buffers[kX];
  p.levels[0].offset = buffers[kOffset];
  p.levels[0].mask = inputs > kMask ? buffers[kMask] : nullptr;
  p.levels[0].y = result;
  const int status = glip_deform_launch(&p, workspace, glip_deform_workspace_bytes(&p), stream);
  if (status) log_error("the kernel could not be launched, CUDA error " + std::to_string(status));
  return status;
}

}  // namespace glip
