// A libcuda.so.1 whose GPU is the host: device memory is host memory, and what is enqueued is done at once, or recorded while a
// stream is captured. It refuses what a driver refuses (memory that is not allocated, no current context, allocating while a
// stream is captured), keeps a log, and counts what is not given back. What differs on a GPU is not simulated.

#include "simulated_cuda.hpp"

#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <mutex>
#include <set>
#include <string>
#include <vector>

namespace {

using Work = std::function<bool()>;
using Graph = std::vector<std::pair<std::string, Work>>;

std::recursive_mutex mutex;
std::map<std::uintptr_t, std::size_t> device_memory, pinned_memory;
std::set<void*> streams, graphs, executables, modules;
std::map<void*, Graph> captured;                      // by stream, while it is captured
std::map<std::string, std::pair<int, int>> failures;  // by function: calls until it fails, and the error
std::string log_lines, taken;
int driver_version = 13000, primary_contexts = 0, violations = 0;
thread_local std::vector<CUcontext> contexts;
int the_context = 0, packed_function = 0, nv12_function = 0;
simulated_resize launcher = nullptr;

bool within(const std::map<std::uintptr_t, std::size_t>& memory, const void* address, std::size_t bytes) {
  const auto at = reinterpret_cast<std::uintptr_t>(address);
  auto after = memory.upper_bound(at);
  return after != memory.begin() && at + bytes <= (--after)->first + after->second;
}

/// The error that a test asked for, or of calling without a context.
CUresult before(const char* function, bool needs_context) {
  if (needs_context && contexts.empty()) return CUDA_ERROR_INVALID_CONTEXT;
  const auto found = failures.find(function);
  if (found == failures.end() || found->second.first-- > 0) return CUDA_SUCCESS;
  const auto error = static_cast<CUresult>(found->second.second);
  failures.erase(found);
  return error;
}

CUresult allocate(std::map<std::uintptr_t, std::size_t>& memory, std::size_t bytes, void** out) {
  if (!captured.empty()) {
    ++violations;
    return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
  }
  *out = std::malloc(bytes);
  std::memset(*out, 7, bytes);  // nobody may count on zeros
  memory[reinterpret_cast<std::uintptr_t>(*out)] = bytes;
  return CUDA_SUCCESS;
}

CUresult release(std::map<std::uintptr_t, std::size_t>& memory, void* address) {
  if (!captured.empty()) ++violations;
  if (!memory.erase(reinterpret_cast<std::uintptr_t>(address))) return CUDA_ERROR_INVALID_VALUE;
  std::free(address);
  return CUDA_SUCCESS;
}

CUresult copy(const char* name, void* target, const void* source, std::size_t bytes, void* stream) {
  return simulated_enqueue(name, stream, [=] {
    std::memcpy(target, source, bytes);
    return true;
  });
}

}  // namespace

#define LOCKED const std::lock_guard<std::recursive_mutex> lock(mutex)
#define CALLED_IN(context) \
  LOCKED;                  \
  if (const CUresult failed = before(__func__, context)) return failed
#define CALLED CALLED_IN(true)
#define CALLED_ANYWHERE CALLED_IN(false)

CUresult simulated_enqueue(const char* name, void* stream, const Work& work) {
  LOCKED;
  if (contexts.empty() || !streams.count(stream)) return CUDA_ERROR_INVALID_HANDLE;
  const auto capture = captured.find(stream);
  if (capture != captured.end()) {
    capture->second.emplace_back(name, work);
    return CUDA_SUCCESS;
  }
  log_lines += std::string(name) + "\n";
  return work() ? CUDA_SUCCESS : CUDA_ERROR_LAUNCH_FAILED;
}

bool simulated_is_device(const void* address, std::size_t bytes) {
  LOCKED;
  return within(device_memory, address, bytes);
}

extern "C" {

const char* simulated_log() {
  LOCKED;
  taken.swap(log_lines);
  log_lines.clear();
  return taken.c_str();
}

int simulated_live(const char* what) {
  LOCKED;
  const std::map<std::string, std::size_t> counts = {
      {"device", device_memory.size()},
      {"pinned", pinned_memory.size()},
      {"streams", streams.size()},
      {"graphs", graphs.size()},
      {"executables", executables.size()},
      {"modules", modules.size()},
      {"primary", static_cast<std::size_t>(primary_contexts)},
      {"current", contexts.size()},
      {"violations", static_cast<std::size_t>(violations)},
  };
  return static_cast<int>(counts.at(what));
}

void simulated_fail(const char* function, int after, int error) {
  LOCKED;
  failures[function] = {after, error};
}

void simulated_driver(int version) { driver_version = version; }
void simulated_launcher(simulated_resize function) { launcher = function; }

CUresult cuInit(unsigned) {
  CALLED_ANYWHERE;
  return CUDA_SUCCESS;
}
CUresult cuDriverGetVersion(int* version) {
  CALLED_ANYWHERE;
  *version = driver_version;
  return CUDA_SUCCESS;
}
CUresult cuDeviceGetCount(int* count) {
  CALLED_ANYWHERE;
  *count = 1;
  return CUDA_SUCCESS;
}
CUresult cuDeviceGet(CUdevice* device, int) {
  CALLED_ANYWHERE;
  *device = 0;
  return CUDA_SUCCESS;
}

CUresult cuDeviceGetName(char* name, int size, CUdevice) {
  CALLED_ANYWHERE;
  std::strncpy(name, "Simulated GPU", static_cast<std::size_t>(size));
  return CUDA_SUCCESS;
}

CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute attribute, CUdevice) {
  CALLED_ANYWHERE;
  *value = attribute == CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR ? 8 : 0;
  return CUDA_SUCCESS;
}

CUresult cuCtxGetCurrent(CUcontext* context) {
  CALLED_ANYWHERE;
  *context = contexts.empty() ? nullptr : contexts.back();
  return CUDA_SUCCESS;
}

CUresult cuCtxGetDevice(CUdevice* device) {
  CALLED;
  *device = 0;
  return CUDA_SUCCESS;
}

CUresult cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice) {
  CALLED_ANYWHERE;
  ++primary_contexts;
  *context = reinterpret_cast<CUcontext>(&the_context);
  return CUDA_SUCCESS;
}

CUresult cuDevicePrimaryCtxRelease(CUdevice) {
  CALLED_ANYWHERE;
  --primary_contexts;
  return CUDA_SUCCESS;
}
CUresult cuCtxPushCurrent(CUcontext context) {
  CALLED_ANYWHERE;
  contexts.push_back(context);
  return CUDA_SUCCESS;
}

CUresult cuCtxPopCurrent(CUcontext* context) {
  CALLED;
  *context = contexts.back();
  contexts.pop_back();
  return CUDA_SUCCESS;
}

CUresult cuStreamCreate(CUstream* stream, unsigned flags) {
  CALLED;
  if (flags != CU_STREAM_NON_BLOCKING) return CUDA_ERROR_INVALID_VALUE;
  *stream = static_cast<CUstream>(std::malloc(1));
  streams.insert(*stream);
  return CUDA_SUCCESS;
}

CUresult cuStreamDestroy(CUstream stream) {
  CALLED;
  if (!streams.erase(stream)) return CUDA_ERROR_INVALID_HANDLE;
  std::free(stream);
  return CUDA_SUCCESS;
}

CUresult cuStreamSynchronize(CUstream stream) {
  CALLED;
  if (captured.count(stream)) return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
  log_lines += !stream ? "wait for the default stream\n" : streams.count(stream) ? "wait\n" : "wait for another stream\n";
  return CUDA_SUCCESS;
}

CUresult cuMemAlloc(CUdeviceptr* address, std::size_t bytes) {
  CALLED;
  void* made = nullptr;
  const CUresult result = allocate(device_memory, bytes, &made);
  *address = reinterpret_cast<CUdeviceptr>(made);
  return result;
}

CUresult cuMemFree(CUdeviceptr address) {
  CALLED;
  return release(device_memory, reinterpret_cast<void*>(address));
}
CUresult cuMemHostAlloc(void** address, std::size_t bytes, unsigned) {
  CALLED;
  return allocate(pinned_memory, bytes, address);
}
CUresult cuMemFreeHost(void* address) {
  CALLED;
  return release(pinned_memory, address);
}

CUresult cuMemcpyHtoDAsync(CUdeviceptr target, const void* source, std::size_t bytes, CUstream stream) {
  CALLED;
  auto* const place = reinterpret_cast<void*>(target);
  if (!within(device_memory, place, bytes) || !within(pinned_memory, source, bytes)) return CUDA_ERROR_INVALID_VALUE;
  return copy("upload", place, source, bytes, stream);
}

CUresult cuMemcpyDtoHAsync(void* target, CUdeviceptr source, std::size_t bytes, CUstream stream) {
  CALLED;
  const auto* const place = reinterpret_cast<const void*>(source);
  if (!within(pinned_memory, target, bytes) || !within(device_memory, place, bytes)) return CUDA_ERROR_INVALID_VALUE;
  return copy("download", target, place, bytes, stream);
}

CUresult cuStreamBeginCapture(CUstream stream, CUstreamCaptureMode) {
  CALLED;
  if (!streams.count(stream) || captured.count(stream)) return CUDA_ERROR_INVALID_VALUE;
  captured[stream] = {};
  return CUDA_SUCCESS;
}

CUresult cuStreamEndCapture(CUstream stream, CUgraph* graph) {
  LOCKED;
  auto node = captured.extract(stream);
  if (node.empty()) return CUDA_ERROR_ILLEGAL_STATE;
  if (const CUresult failed = before(__func__, true)) return failed;
  auto* const made = new Graph(std::move(node.mapped()));
  graphs.insert(made);
  *graph = reinterpret_cast<CUgraph>(made);
  return CUDA_SUCCESS;
}

CUresult cuGraphInstantiateWithFlags(CUgraphExec* executable, CUgraph graph, unsigned long long) {
  CALLED;
  if (!graphs.count(graph)) return CUDA_ERROR_INVALID_VALUE;
  auto* const made = new Graph(*reinterpret_cast<Graph*>(graph));
  executables.insert(made);
  *executable = reinterpret_cast<CUgraphExec>(made);
  return CUDA_SUCCESS;
}

CUresult cuGraphDestroy(CUgraph graph) {
  CALLED;
  if (!graphs.erase(graph)) return CUDA_ERROR_INVALID_VALUE;
  delete reinterpret_cast<Graph*>(graph);
  return CUDA_SUCCESS;
}

CUresult cuGraphExecDestroy(CUgraphExec executable) {
  CALLED;
  if (!executables.erase(executable)) return CUDA_ERROR_INVALID_VALUE;
  delete reinterpret_cast<Graph*>(executable);
  return CUDA_SUCCESS;
}

CUresult cuGraphLaunch(CUgraphExec executable, CUstream stream) {
  CALLED;
  if (!executables.count(executable) || !streams.count(stream)) return CUDA_ERROR_INVALID_VALUE;
  log_lines += "launch\n";
  for (const auto& [name, work] : *reinterpret_cast<Graph*>(executable)) {
    if (!work()) return CUDA_ERROR_LAUNCH_FAILED;
  }
  return CUDA_SUCCESS;
}

CUresult cuModuleLoadData(CUmodule* module, const void* image) {
  CALLED;
  if (std::memcmp(image, "\177ELF", 4) != 0) return CUDA_ERROR_INVALID_IMAGE;  // what NVRTC makes
  *module = static_cast<CUmodule>(std::malloc(1));
  modules.insert(*module);
  return CUDA_SUCCESS;
}

CUresult cuModuleUnload(CUmodule module) {
  CALLED;
  if (!modules.erase(module)) return CUDA_ERROR_INVALID_HANDLE;
  std::free(module);
  return CUDA_SUCCESS;
}

CUresult cuModuleGetFunction(CUfunction* function, CUmodule module, const char* name) {
  CALLED;
  const bool nv12 = std::strcmp(name, "glip_resize_nv12") == 0;
  if (!modules.count(module) || (!nv12 && std::strcmp(name, "glip_resize") != 0)) return CUDA_ERROR_NOT_FOUND;
  *function = reinterpret_cast<CUfunction>(nv12 ? &nv12_function : &packed_function);
  return CUDA_SUCCESS;
}

CUresult cuLaunchKernel(CUfunction function, unsigned blocks_x, unsigned blocks_y, unsigned, unsigned threads_x,
                        unsigned threads_y, unsigned, unsigned, CUstream stream, void** arguments, void**) {
  CALLED;
  const auto number = [&](int index) { return *static_cast<int*>(arguments[index]); };
  const auto* const source = *static_cast<const std::uint8_t**>(arguments[0]);
  const long long pitch = *static_cast<long long*>(arguments[1]);
  auto* const canvas = *static_cast<std::uint8_t**>(arguments[6]);
  const int canvas_height = number(7), canvas_width = number(8);
  const std::size_t bytes = static_cast<std::size_t>(canvas_height) * static_cast<std::size_t>(canvas_width) * 3;
  const bool covered = blocks_x * threads_x >= static_cast<unsigned>(canvas_width) &&
                       blocks_y * threads_y >= static_cast<unsigned>(canvas_height);
  if (!within(device_memory, canvas, bytes) || !covered || !launcher) return CUDA_ERROR_INVALID_VALUE;
  const bool nv12 = function == reinterpret_cast<CUfunction>(&nv12_function);
  const int height = number(nv12 ? 4 : 2), width = number(nv12 ? 5 : 3), to_height = number(9), to_width = number(10);
  const int channels = nv12 ? 1 : number(4), red = nv12 ? 0 : number(5);
  const auto* const chroma = nv12 ? *static_cast<const std::uint8_t**>(arguments[2]) : nullptr;
  const long long chroma_pitch = nv12 ? *static_cast<long long*>(arguments[3]) : 0;
  // Packed pictures that were uploaded; others are the caller's, in memory that the simulation does not know.
  const bool uploaded = within(device_memory, source, static_cast<std::size_t>(pitch * height)) &&
                        (!nv12 || within(device_memory, chroma, static_cast<std::size_t>(chroma_pitch * height / 2)));
  return simulated_enqueue(uploaded ? "resize the upload" : "resize", stream, [=] {
    launcher(source, pitch, height, width, channels, red, chroma, chroma_pitch, canvas, canvas_height, canvas_width, to_height,
             to_width);
    return true;
  });
}

/// NVRTC asks a driver for one, and does without.
CUresult cuGetExportTable(const void** table, const CUuuid*) {
  *table = nullptr;
  return CUDA_ERROR_NOT_FOUND;
}

CUresult cuGetErrorName(CUresult error, const char** name) {
  *name = error == CUDA_ERROR_OUT_OF_MEMORY ? "CUDA_ERROR_OUT_OF_MEMORY" : "CUDA_ERROR_OF_THE_SIMULATION";
  return CUDA_SUCCESS;
}

}  // extern "C"
