// What TensorRT does with a plugin library, for tests on a CPU: the adapter for TensorRT 10 and later, its kernels
// exchanged for the host build of the same arithmetic (fp32, in the CPU's memory).
#include "adapter_v3.cpp"
#include "host/deform_host.cpp"

const char* glip_deform_problem_error(const GlipDeformProblem* p) { return glip_deform_host_problem_error(p); }

unsigned long long glip_deform_workspace_bytes(const GlipDeformProblem* p) { return glip::workspace_bytes(*p); }

int glip_deform_launch(const GlipDeformProblem* p, void* workspace, unsigned long long bytes, void*) {
  if (bytes < glip::workspace_bytes(*p) || (bytes && !workspace)) return -1;
  return glip_deform_host_run(p, 32);
}

namespace {

PluginTensorDesc describe(int rank, const int64_t* dims, int type, int format) {
  PluginTensorDesc tensor{};
  tensor.dims.nbDims = rank;
  for (int i = 0; i < rank; ++i) tensor.dims.d[i] = dims[i];
  tensor.type = static_cast<DataType>(type);
  tensor.format = static_cast<TensorFormat>(format);
  return tensor;
}

}  // namespace

extern "C" {

// A plugin of these integer attributes, or null.
GLIP_DEFORM_API void* harness_create(int count, const char* const* names, const int64_t* const* values,
                                     const int* lengths) {
  std::vector<PluginField> fields;
  for (int i = 0; i < count; ++i) fields.emplace_back(names[i], values[i], PluginFieldType::kINT64, lengths[i]);
  const PluginFieldCollection collection{count, fields.data()};
  int32_t creators = 0;
  auto* creator = static_cast<IPluginCreatorV3One*>(getCreators(creators)[0]);
  return creator->createPlugin("node", &collection, TensorRTPhase::kBUILD);
}

GLIP_DEFORM_API void harness_destroy(void* plugin) { delete static_cast<IPluginV3*>(plugin); }

GLIP_DEFORM_API const char* harness_timing_id(void* plugin) {
  auto* build = static_cast<IPluginV3*>(plugin)->getCapabilityInterface(PluginCapabilityType::kBUILD);
  return static_cast<IPluginV3OneBuild*>(build)->getTimingCacheID();
}

// Whether tensor `position` may have its type and format, given those before it; one shape for all.
GLIP_DEFORM_API int harness_accepts(void* plugin, int position, int inputs, const int* types, const int* formats) {
  const int64_t dims[] = {1, 32, 8, 8};
  std::vector<DynamicPluginTensorDesc> tensors(inputs + 1);
  for (int i = 0; i <= inputs; ++i) tensors[i].desc = describe(4, dims, types[i], formats[i]);
  auto* build = static_cast<IPluginV3*>(plugin)->getCapabilityInterface(PluginCapabilityType::kBUILD);
  return static_cast<IPluginV3OneBuild*>(build)->supportsFormatCombination(position, tensors.data(), inputs, 1);
}

// Runs a plugin on fp32 buffers in the CPU's memory; ranks and dims of the inputs, then of the output.
// Returns -1 where a shape is refused, else enqueue's status.
GLIP_DEFORM_API int harness_run(void* plugin, int inputs, const int* ranks, const int64_t* const* dims,
                                const void* const* buffers, void* result) {
  std::vector<PluginTensorDesc> tensors;
  for (int i = 0; i <= inputs; ++i) tensors.push_back(describe(ranks[i], dims[i], 0, 0));
  std::vector<DynamicPluginTensorDesc> dynamic(inputs + 1);
  for (int i = 0; i <= inputs; ++i) {
    dynamic[i].desc = tensors[i];
    dynamic[i].min = dynamic[i].max = tensors[i].dims;
  }
  auto* core = static_cast<IPluginV3*>(plugin);
  auto* build = static_cast<IPluginV3OneBuild*>(core->getCapabilityInterface(PluginCapabilityType::kBUILD));
  if (build->configurePlugin(dynamic.data(), inputs, &dynamic[inputs], 1)) return -1;
  std::vector<unsigned char> workspace(build->getWorkspaceSize(dynamic.data(), inputs, &dynamic[inputs], 1));
  auto* runtime = static_cast<IPluginV3OneRuntime*>(core->getCapabilityInterface(PluginCapabilityType::kRUNTIME));
  if (runtime->onShapeChange(tensors.data(), inputs, &tensors[inputs], 1)) return -1;
  void* outputs[] = {result};
  return runtime->enqueue(tensors.data(), &tensors[inputs], buffers, outputs, workspace.data(), nullptr);
}
}
