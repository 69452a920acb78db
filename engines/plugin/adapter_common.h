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
constexpr char kVersion[] = "3";
constexpr char kNamespace[] = "glip";

// Inputs: features (batch, locations of all levels one after another, channels); weights, packed as
// glip_deform_pack_weights does it: (taps, padded input channels, padded output channels); bias; then for each level,
// from the largest map to the smallest, a map of its size whose channels are 2 x taps offsets and taps masks before
// their sigmoid.
enum Input { kX = 0, kWeight = 1, kBias = 2, kPositions = 3 };
constexpr int kMinInputs = kPositions + 1, kMaxInputs = kPositions + GLIP_DEFORM_MAX_LEVELS;

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

// The attributes of ONNX DeformConv, by the names they have there, and two more.
struct Attributes {
  int kernel_shape[2] = {0, 0};  // needed, as packed weights do not tell it
  int out_channels = 0;          // likewise, before padding
  int reads = 0;                 // level i reads level i + reads: its own (0), the larger (-1) or the smaller (1)
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
    return {{"kernel_shape", kernel_shape, 2}, {"out_channels", &out_channels, 1}, {"reads", &reads, 1},
            {"strides", strides, 2},           {"pads", pads, 4},                  {"dilations", dilations, 2},
            {"group", &group, 1},              {"offset_group", &offset_group, 1}};
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
  if (a.out_channels < 1 || a.out_channels % kVector)
    return "out_channels is " + std::to_string(a.out_channels) + "; multiples of " + std::to_string(kVector) +
           " are supported";
  if (a.reads < -1 || a.reads > 1) return "reads is " + std::to_string(a.reads) + "; -1, 0 and 1 are supported";
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
  if (here.format != nvinfer1::TensorFormat::kLINEAR) return false;  // which is channels last for X and the output
  if (position == kX) return data_type(here.type) >= 0;
  // Never in half precision, even where the builder may choose (8.6): positions would be off by 1/16 pixel and more.
  if (position >= kPositions && position < inputs) return here.type == nvinfer1::DataType::kFLOAT;
  return here.type == tensors[kX].type;
}

// -- running --------------------------------------------------------------------------------------------------------

inline std::string dims_text(const nvinfer1::Dims& dims) {
  std::string text;
  for (int i = 0; i < dims.nbDims; ++i) text += (i ? "x" : "") + std::to_string(dims.d[i]);
  return text;
}

// What a node convolves: pairs of a level that says where to sample and a level that is sampled.
inline int first_level(const Attributes& a) { return a.reads < 0 ? 1 : 0; }
inline int last_level(const Attributes& a, int levels) { return a.reads > 0 ? levels - 2 : levels - 1; }
// The level whose size the output of level `i` has: the smaller one.
inline int output_level(const Attributes& a, int i) { return a.reads > 0 ? i + 1 : i; }

// Returns what is wrong with the shapes of a node's inputs, or an empty string; a side of -1 is not known yet.
inline std::string shape_error(const Attributes& a, const nvinfer1::Dims* dims, int inputs) {
  if (inputs < kMinInputs || inputs > kMaxInputs)
    return std::to_string(inputs) + " inputs; X, W, B and 1 to " + std::to_string(GLIP_DEFORM_MAX_LEVELS) +
           " maps are supported";
  const nvinfer1::Dims &x = dims[kX], &w = dims[kWeight];
  if (x.nbDims != 3) return "X has shape " + dims_text(x) + ", not (batch, locations, channels)";
  const int taps = a.kernel_shape[0] * a.kernel_shape[1];
  const auto differs = [](auto given, auto wanted) { return given >= 0 && wanted >= 0 && given != wanted; };
  if (x.d[2] >= 0 && x.d[2] % kVector)
    return "X has " + std::to_string(x.d[2]) + " channels; multiples of " + std::to_string(kVector) + " are supported";
  const int padded_in = x.d[2] < 0 ? -1 : round_up(static_cast<int>(x.d[2]), kChannelStep);
  const int padded_out = round_up(a.out_channels, kOutputStep);
  if (w.nbDims != 3 || w.d[0] != taps || differs(w.d[1], padded_in) || w.d[2] != padded_out)
    return "W has shape " + dims_text(w) + "; packed for X of shape " + dims_text(x) + " it is " +
           std::to_string(taps) + "x" + std::to_string(padded_in) + "x" + std::to_string(padded_out);
  if (dims[kBias].nbDims != 1 || differs(dims[kBias].d[0], a.out_channels))
    return "B has shape " + dims_text(dims[kBias]) + ", not one number for each of the out_channels";
  const int levels = inputs - kPositions;
  if (a.reads && levels < 2) return "there is one level, which has no neighbor to read";
  long long locations = 0;
  bool known = true;
  for (int i = 0; i < levels; ++i) {
    const nvinfer1::Dims& map = dims[kPositions + i];
    if (map.nbDims != 4 || differs(map.d[1], 3 * taps) || differs(map.d[0], x.d[0]))
      return "map " + std::to_string(i) + " has shape " + dims_text(map) + "; it is (batch, 3 x taps, height, width)";
    known = known && map.d[2] >= 0 && map.d[3] >= 0;
    locations += static_cast<long long>(map.d[2]) * map.d[3];
  }
  if (!known) return "";
  if (differs(static_cast<long long>(x.d[1]), locations))
    return "X has " + std::to_string(x.d[1]) + " locations; the maps have " + std::to_string(locations);
  for (int i = first_level(a); i <= last_level(a, levels); ++i)
    for (int axis = 0; axis < 2; ++axis) {
      const auto size = dims[kPositions + i + a.reads].d[2 + axis];
      const auto out = dims[kPositions + output_level(a, i)].d[2 + axis];
      const auto reach = size + a.pads[axis] + a.pads[2 + axis] - a.dilations[axis] * (a.kernel_shape[axis] - 1) - 1;
      if (reach < 0 || reach / a.strides[axis] + 1 != out)
        return "level " + std::to_string(i) + " convolves a side of " + std::to_string(size) +
               ", whose result is not the " + std::to_string(out) + " of the smaller map";
    }
  return "";
}

// Returns the shape of a node's output: as many locations as X, without the largest map's where neighbors are read.
inline nvinfer1::DimsExprs output_dims(const Attributes& a, const nvinfer1::DimsExprs* in,
                                       nvinfer1::IExprBuilder& builder) {
  using nvinfer1::DimensionOperation;
  nvinfer1::DimsExprs out = in[kX];
  out.d[2] = builder.constant(a.out_channels);
  if (a.reads) {
    const nvinfer1::DimsExprs& largest = in[kPositions];
    const auto* locations = builder.operation(DimensionOperation::kPROD, *largest.d[2], *largest.d[3]);
    out.d[1] = builder.operation(DimensionOperation::kSUB, *out.d[1], *locations);
  }
  return out;
}

// Returns a node's problem; all sides must be known. X and the output are read and written in place.
inline GlipDeformProblem make_problem(const Attributes& a, const nvinfer1::PluginTensorDesc* in, int inputs,
                                      const void* const* buffers, void* result) {
  const auto side = [](const nvinfer1::PluginTensorDesc& tensor, int i) { return static_cast<int>(tensor.dims.d[i]); };
  GlipDeformProblem p{};
  p.batch = side(in[kX], 0);
  p.in_channels = side(in[kX], 2);
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
  p.position_type = GLIP_DEFORM_F32;
  p.x_layout = p.y_layout = GLIP_DEFORM_NHWC;
  p.mask_logits = 1;
  p.weight = buffers[kWeight];
  p.bias = buffers[kBias];

  const int levels = inputs - kPositions, taps = p.kernel_height * p.kernel_width;
  const int element = p.data_type == GLIP_DEFORM_F32 ? 4 : 2;
  long long starts[GLIP_DEFORM_MAX_LEVELS + 1] = {0};
  const auto height = [&](int i) { return side(in[kPositions + i], 2); };
  const auto width = [&](int i) { return side(in[kPositions + i], 3); };
  for (int i = 0; i < levels; ++i) starts[i + 1] = starts[i] + static_cast<long long>(height(i)) * width(i);
  const long long skipped = a.reads ? starts[1] : 0;  // the output has no level of the largest map's size then
  for (int i = first_level(a); i <= last_level(a, levels); ++i) {
    const int from = i + a.reads, to = output_level(a, i);
    GlipDeformLevel& level = p.levels[p.num_levels++];
    const auto* positions = static_cast<const float*>(buffers[kPositions + i]);
    const long long plane = starts[i + 1] - starts[i];
    level.x = static_cast<const char*>(buffers[kX]) + starts[from] * p.in_channels * element;
    level.offset = positions;
    level.mask = positions + 2 * taps * plane;
    level.y = static_cast<char*>(result) + (starts[to] - skipped) * p.out_channels * element;
    level.x_batch_stride = starts[levels] * p.in_channels;
    level.offset_batch_stride = level.mask_batch_stride = 3 * taps * plane;
    level.y_batch_stride = (starts[levels] - skipped) * p.out_channels;
    level.height = height(from);
    level.width = width(from);
    level.out_height = height(to);
    level.out_width = width(to);
  }
  return p;
}

// Enqueues a node; returns 0 for success.
inline int run(const Attributes& a, const nvinfer1::PluginTensorDesc* in, int inputs, const void* const* buffers,
               void* result, void* stream) {
  const GlipDeformProblem p = make_problem(a, in, inputs, buffers, result);
  if (const char* error = glip_deform_problem_error(&p)) {
    log_error(error);
    return 1;
  }
  const int status = glip_deform_launch(&p, nullptr, 0, stream);
  if (status) log_error("the kernel could not be launched, CUDA error " + std::to_string(status));
  return status;
}

}  // namespace glip
