// The C interface of glip_deform.h, by the CUDA runtime.
#include "deform_kernel.cuh"

#include <cuda_runtime.h>

#include <atomic>
#include <cstring>

#include "deform_plan.h"

namespace {

using Kernel = void (*)(glip::Launch);

struct Entry {
  int data_type;
  const char* suffix;
  Kernel kernel;
};

constexpr Entry kEntries[] = {
    {GLIP_DEFORM_F16, "wide", glip_deform_f16_wide},       {GLIP_DEFORM_F16, "medium", glip_deform_f16_medium},
    {GLIP_DEFORM_F16, "small", glip_deform_f16_small},     {GLIP_DEFORM_F16, "scalar", glip_deform_f16_scalar},
    {GLIP_DEFORM_BF16, "wide", glip_deform_bf16_wide},     {GLIP_DEFORM_BF16, "medium", glip_deform_bf16_medium},
    {GLIP_DEFORM_BF16, "small", glip_deform_bf16_small},   {GLIP_DEFORM_BF16, "scalar", glip_deform_bf16_scalar},
    {GLIP_DEFORM_F32, "scalar", glip_deform_f32_scalar},
};
constexpr int kDevices = 64;

Kernel find_kernel(int data_type, const char* suffix) {
  for (const Entry& entry : kEntries)
    if (entry.data_type == data_type && !std::strcmp(entry.suffix, suffix)) return entry.kernel;
  return nullptr;
}

struct Device {
  int number;
  int capability;  // of the code it runs, which may have been compiled for an older GPU
  int processors;
};

// Asks the driver once per device. Any kernel stands for all: they were compiled together.
cudaError_t current_device(Device* device) {
  static std::atomic<int> capabilities[kDevices], processors[kDevices];
  cudaError_t error = cudaGetDevice(&device->number);
  if (error != cudaSuccess) return error;
  const bool known = device->number < kDevices;
  if (known) {
    device->capability = capabilities[device->number].load(std::memory_order_relaxed);
    device->processors = processors[device->number].load(std::memory_order_relaxed);
    if (device->capability && device->processors) return cudaSuccess;
  }
  cudaFuncAttributes attributes{};
  error = cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(glip_deform_f32_scalar));
  if (error == cudaSuccess)
    error = cudaDeviceGetAttribute(&device->processors, cudaDevAttrMultiProcessorCount, device->number);
  if (error != cudaSuccess) return error;
  device->capability = attributes.ptxVersion;
  if (known) {
    capabilities[device->number].store(device->capability, std::memory_order_relaxed);
    processors[device->number].store(device->processors, std::memory_order_relaxed);
  }
  return cudaSuccess;
}

// Allows a kernel the shared memory it uses. Asked for at every launch, because it belongs to the current context (a
// process may have several of a device, torch's and PyCUDA's for instance) and takes no time on the GPU.
cudaError_t allow_shared_memory(Kernel kernel, int bytes) {
  constexpr int kWithoutAsking = 48 * 1024;
  if (bytes <= kWithoutAsking) return cudaSuccess;
  return cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                              bytes);
}

bool misaligned(const void* pointer) { return reinterpret_cast<std::uintptr_t>(pointer) % 16 != 0; }

// What would make kernels fail that read and write 16 bytes at a time.
bool bad_buffers(const GlipDeformProblem& p) {
  const int vector = 16 / glip::element_size(p.data_type);
  if (misaligned(p.weight) || !p.weight) return true;
  for (int i = 0; i < p.num_levels; ++i) {
    const GlipDeformLevel level = glip::with_strides(p, p.levels[i]);
    if (!level.x || !level.offset || !level.y || misaligned(level.y)) return true;
    if (p.x_layout == GLIP_DEFORM_NHWC && (misaligned(level.x) || level.x_batch_stride % vector)) return true;
  }
  return false;
}

void transpose(const GlipDeformProblem& p, const glip::Launch& launch, cudaStream_t stream) {
  for (int i = 0; i < p.num_levels; ++i) {
    const GlipDeformLevel from = glip::with_strides(p, p.levels[i]);
    void* to = const_cast<void*>(launch.levels[i].x);
    const int pixels = from.height * from.width;
    const dim3 grid(glip::ceil_div(pixels, 32), glip::ceil_div(launch.in_channels, 32), p.batch);
    const auto kernel = p.data_type == GLIP_DEFORM_F32   ? glip_deform_transpose_f32
                        : p.data_type == GLIP_DEFORM_F16 ? glip_deform_transpose_f16
                                                         : glip_deform_transpose_bf16;
    kernel<<<grid, 256, 0, stream>>>(from.x, from.x_batch_stride, to, pixels, p.in_channels, launch.in_channels);
  }
}

}  // namespace

const char* glip_deform_problem_error(const GlipDeformProblem* problem) { return glip::problem_error(*problem); }

unsigned long long glip_deform_packed_weight_bytes(const GlipDeformProblem* problem) {
  return glip::packed_weight_elements(*problem) * glip::element_size(problem->data_type);
}

unsigned long long glip_deform_workspace_bytes(const GlipDeformProblem* problem) {
  return glip::workspace_bytes(*problem);
}

int glip_deform_pack_weights(const GlipDeformProblem* problem, const void* weight, void* packed, void* stream) {
  const GlipDeformProblem& p = *problem;
  const auto kernel = p.data_type == GLIP_DEFORM_F32   ? glip_deform_pack_f32
                      : p.data_type == GLIP_DEFORM_F16 ? glip_deform_pack_f16
                                                       : glip_deform_pack_bf16;
  const auto blocks = static_cast<unsigned>((glip::packed_weight_elements(p) + 255) / 256);
  kernel<<<blocks, 256, 0, static_cast<cudaStream_t>(stream)>>>(weight, packed, p.kernel_height * p.kernel_width,
                                                                p.in_channels, p.out_channels);
  return cudaGetLastError();
}

int glip_deform_launch(const GlipDeformProblem* problem, void* workspace, unsigned long long workspace_bytes,
                       void* stream) {
  const GlipDeformProblem& p = *problem;
  if (glip::problem_error(p) || bad_buffers(p)) return -1;
  const std::size_t needed = glip::workspace_bytes(p);
  if (needed && (!workspace || workspace_bytes < needed || misaligned(workspace))) return -1;
  Device device{};
  cudaError_t error = current_device(&device);
  if (error != cudaSuccess) return error;

  const glip::TileShape& tile = glip::choose_tile(p, device.capability, device.processors);
  const glip::Launch launch = glip::make_launch(p, tile.pixels, workspace);
  const int bytes = glip::shared_bytes(tile, p.data_type, device.capability);
  const Kernel kernel = find_kernel(p.data_type, tile.suffix);
  error = allow_shared_memory(kernel, bytes);
  if (error != cudaSuccess) return error;
  if (p.x_layout == GLIP_DEFORM_NCHW) transpose(p, launch, static_cast<cudaStream_t>(stream));
  const dim3 grid(launch.first_tile[p.num_levels], glip::ceil_div(p.out_channels, tile.channels));
  kernel<<<grid, tile.threads, bytes, static_cast<cudaStream_t>(stream)>>>(launch);
  return cudaGetLastError();
}
