#include "cuda.hpp"

#include "glip/glip.hpp"
#include "resize_source.hpp"
#include "shared_library.hpp"

namespace glip {

#define GLIP_TEXT_OF(name) #name
#define GLIP_SYMBOL(name) GLIP_TEXT_OF(name)  // CUDA's header renames some functions: cuMemAlloc is cuMemAlloc_v2
// clang-format off
#define GLIP_CUDA_FUNCTIONS(F)                                                                                                \
  F(cuInit) F(cuDriverGetVersion) F(cuDeviceGetCount) F(cuDeviceGet) F(cuDeviceGetName) F(cuDeviceGetAttribute)               \
  F(cuCtxGetCurrent) F(cuCtxGetDevice) F(cuCtxPushCurrent) F(cuCtxPopCurrent) F(cuDevicePrimaryCtxRetain)                     \
  F(cuDevicePrimaryCtxRelease) F(cuStreamCreate) F(cuStreamDestroy) F(cuStreamSynchronize) F(cuMemAlloc) F(cuMemFree)         \
  F(cuMemHostAlloc) F(cuMemFreeHost) F(cuMemcpyHtoDAsync) F(cuMemcpyDtoHAsync) F(cuStreamBeginCapture) F(cuStreamEndCapture)  \
  F(cuGraphInstantiateWithFlags) F(cuGraphDestroy) F(cuGraphExecDestroy) F(cuGraphLaunch) F(cuModuleLoadData)                 \
  F(cuModuleUnload) F(cuModuleGetFunction) F(cuLaunchKernel) F(cuGetErrorName)
// clang-format on

struct CudaFunctions {
#define GLIP_MEMBER(name) decltype(&::name) name##_;
  GLIP_CUDA_FUNCTIONS(GLIP_MEMBER)
#undef GLIP_MEMBER
};

namespace {

const char* const kDriver = "install the NVIDIA driver, or use backend openvino";
constexpr unsigned kBlockWidth = 32, kBlockHeight = 8;  // threads of a block

const CudaFunctions& the_functions() {
  static const CudaFunctions functions = [] {
    const auto library = SharedLibrary::open("there is no NVIDIA driver here", {"libcuda.so.1"}, kDriver);
    CudaFunctions out{};
#define GLIP_LOAD(name) out.name##_ = library.function<decltype(&::name)>(GLIP_SYMBOL(name));
    GLIP_CUDA_FUNCTIONS(GLIP_LOAD)
#undef GLIP_LOAD
    return out;
  }();
  return functions;
}

}  // namespace

Cuda::Active::Active(const Cuda& cuda) : cuda_(cuda) { cuda.call(cuda.functions_.cuCtxPushCurrent_(cuda.context_)); }

Cuda::Active::~Active() {
  CUcontext popped = nullptr;
  cuda_.functions_.cuCtxPopCurrent_(&popped);
}

void Cuda::call(CUresult result) const {
  if (result == CUDA_SUCCESS) return;
  const char* name = nullptr;
  functions_.cuGetErrorName_(result, &name);
  throw Error(ErrorKind::backend, std::string("the GPU cannot be used: ") + (name ? name : "unknown error") + " (" +
                                      std::to_string(static_cast<int>(result)) + ")" +
                                      (result == CUDA_ERROR_OUT_OF_MEMORY ? "; close other programs or build smaller engines"
                                                                          : "; see whether nvidia-smi names it"));
}

Cuda::Cuda() : functions_(the_functions()) {
  int count = 0;
  const CUresult started = functions_.cuInit_(0);
  if (started != CUDA_SUCCESS || functions_.cuDeviceGetCount_(&count) != CUDA_SUCCESS || count == 0) {
    throw Error(ErrorKind::missing, "the NVIDIA driver finds no GPU here (error " + std::to_string(static_cast<int>(started)) +
                                        "); see whether nvidia-smi names one, or use backend openvino");
  }
  call(functions_.cuDriverGetVersion_(&driver_));
  call(functions_.cuCtxGetCurrent_(&context_));
  if (context_) {
    call(functions_.cuCtxGetDevice_(&device_));
  } else {
    call(functions_.cuDeviceGet_(&device_, 0));
  }
  char name[256] = {};
  int major = 0, minor = 0;
  call(functions_.cuDeviceGetName_(name, sizeof name - 1, device_));
  call(functions_.cuDeviceGetAttribute_(&major, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, device_));
  call(functions_.cuDeviceGetAttribute_(&minor, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR, device_));
  gpu_ = {name, 10 * major + minor};
  if (!context_) {  // last: nothing after it can fail and leave it retained
    call(functions_.cuDevicePrimaryCtxRetain_(&context_, device_));
    primary_ = true;
  }
}

Cuda::~Cuda() {
  if (module_) {
    CUcontext popped = nullptr;
    functions_.cuCtxPushCurrent_(context_);
    functions_.cuModuleUnload_(module_);
    functions_.cuCtxPopCurrent_(&popped);
  }
  if (primary_) functions_.cuDevicePrimaryCtxRelease_(device_);
}

CUstream Cuda::stream() const {
  CUstream made = nullptr;
  call(functions_.cuStreamCreate_(&made, CU_STREAM_NON_BLOCKING));
  return made;
}

void Cuda::free_stream(CUstream stream) const noexcept { functions_.cuStreamDestroy_(stream); }
void Cuda::synchronize(CUstream stream) const { call(functions_.cuStreamSynchronize_(stream)); }

CUdeviceptr Cuda::allocate(std::size_t bytes) const {
  CUdeviceptr made = 0;
  call(functions_.cuMemAlloc_(&made, bytes ? bytes : 1));
  return made;
}

void Cuda::free(CUdeviceptr address) const noexcept { functions_.cuMemFree_(address); }

void* Cuda::pinned(std::size_t bytes) const {
  void* made = nullptr;
  call(functions_.cuMemHostAlloc_(&made, bytes ? bytes : 1, 0));
  return made;
}

void Cuda::free_pinned(void* memory) const noexcept { functions_.cuMemFreeHost_(memory); }

void Cuda::upload(CUdeviceptr target, const void* source, std::size_t bytes, CUstream stream) const {
  call(functions_.cuMemcpyHtoDAsync_(target, source, bytes, stream));
}

void Cuda::download(void* target, CUdeviceptr source, std::size_t bytes, CUstream stream) const {
  call(functions_.cuMemcpyDtoHAsync_(target, source, bytes, stream));
}

CUgraphExec Cuda::capture(CUstream stream, const std::function<void()>& work) const {
  call(functions_.cuStreamBeginCapture_(stream, CU_STREAM_CAPTURE_MODE_THREAD_LOCAL));
  bool failed = false;
  try {
    work();
  } catch (const Error&) {  // of CUDA or of TensorRT
    failed = true;
  } catch (...) {
    CUgraph left = nullptr;
    if (functions_.cuStreamEndCapture_(stream, &left) == CUDA_SUCCESS && left) functions_.cuGraphDestroy_(left);
    throw;
  }
  CUgraph graph = nullptr;
  if (functions_.cuStreamEndCapture_(stream, &graph) != CUDA_SUCCESS || !graph) return nullptr;
  CUgraphExec made = nullptr;
  if (!failed && functions_.cuGraphInstantiateWithFlags_(&made, graph, 0) != CUDA_SUCCESS) made = nullptr;
  functions_.cuGraphDestroy_(graph);
  return made;
}

void Cuda::launch(CUgraphExec graph, CUstream stream) const { call(functions_.cuGraphLaunch_(graph, stream)); }
void Cuda::free_graph(CUgraphExec graph) const noexcept { functions_.cuGraphExecDestroy_(graph); }

namespace {

using Program = void*;

/// Machine code of resize.cu by one NVRTC; empty where it does not know the GPU.
std::string compiled(const SharedLibrary& nvrtc, int compute_capability) {
  const auto create = nvrtc.function<int (*)(Program*, const char*, const char*, int, const char* const*, const char* const*)>(
      "nvrtcCreateProgram");
  const auto compile = nvrtc.function<int (*)(Program, int, const char* const*)>("nvrtcCompileProgram");
  const auto size_of = nvrtc.function<int (*)(Program, std::size_t*)>("nvrtcGetCUBINSize");
  const auto code_of = nvrtc.function<int (*)(Program, char*)>("nvrtcGetCUBIN");
  const auto destroy = nvrtc.function<int (*)(Program*)>("nvrtcDestroyProgram");
  Program program = nullptr;
  if (create(&program, kResizeSource, "resize.cu", 0, nullptr, nullptr) != 0) return {};
  const std::string architecture = "--gpu-architecture=sm_" + std::to_string(compute_capability);
  const char* const options[] = {architecture.c_str(), "--std=c++17"};
  std::string code;
  std::size_t size = 0;
  if (compile(program, 2, options) == 0 && size_of(program, &size) == 0) {
    code.resize(size);
    if (code_of(program, code.data()) != 0) code.clear();
  }
  destroy(&program);
  return code;
}

}  // namespace

void Cuda::prepare_resize(const std::string& instead) const {
  if (resize_) return;
  // A driver takes code of its own CUDA version and of older ones; a newer NVRTC knows fewer of the old GPUs.
  const int newest = driver_ / 1000;
  std::vector<std::string> names;
  if (newest >= 13) names.emplace_back("libnvrtc.so.13");
  if (newest >= 12) names.emplace_back("libnvrtc.so.12");
  names.insert(names.end(), {"libnvrtc.so.11.2", "libnvrtc.so"});
  bool found = false;
  for (const std::string& name : names) {
    if (!SharedLibrary::try_open(name)) continue;
    found = true;
    const std::string code = compiled(SharedLibrary::open("", {name}, "install another NVRTC"), gpu_.compute_capability);
    if (code.empty()) continue;
    if (!module_) call(functions_.cuModuleLoadData_(&module_, code.data()));
    call(functions_.cuModuleGetFunction_(&resize_nv12_, module_, "glip_resize_nv12"));
    call(functions_.cuModuleGetFunction_(&resize_, module_, "glip_resize"));
    return;
  }
  const std::string advice = "; install the libnvrtc of CUDA " + std::to_string(newest) + ", or " + instead;
  if (found) {
    throw Error(ErrorKind::missing, "NVRTC cannot compile resize.cu for SM" + std::to_string(gpu_.compute_capability) + advice);
  }
  throw Error(ErrorKind::missing, "NVRTC, which compiles the GPU's resize, is not installed" + advice);
}

void Cuda::resize(const ImageView& picture, CUdeviceptr canvas, Size canvas_size, Size size, CUstream stream) const {
  const bool nv12 = picture.format == PixelFormat::nv12;
  const bool four = picture.format == PixelFormat::bgra || picture.format == PixelFormat::rgba;
  const bool red_first = picture.format == PixelFormat::rgb || picture.format == PixelFormat::rgba;
  const void* source = picture.data;
  int height = picture.height, width = picture.width, channels = four ? 4 : 3, red = red_first ? 0 : 2;
  auto pitch = static_cast<long long>(picture.pitch);
  if (pitch == 0) pitch = static_cast<long long>(width) * (nv12 ? 1 : channels);
  const void* chroma = picture.chroma ? picture.chroma : static_cast<const char*>(source) + pitch * height;
  auto chroma_pitch = picture.chroma_pitch ? static_cast<long long>(picture.chroma_pitch) : pitch;
  std::vector<void*> arguments{&source, &pitch};
  if (nv12) {
    arguments.insert(arguments.end(), {&chroma, &chroma_pitch, &height, &width});
  } else {
    arguments.insert(arguments.end(), {&height, &width, &channels, &red});
  }
  arguments.insert(arguments.end(), {&canvas, &canvas_size.height, &canvas_size.width, &size.height, &size.width});
  const auto blocks = [](int side, unsigned threads) { return (static_cast<unsigned>(side) + threads - 1) / threads; };
  call(functions_.cuLaunchKernel_(nv12 ? resize_nv12_ : resize_, blocks(canvas_size.width, kBlockWidth),
                                  blocks(canvas_size.height, kBlockHeight), 1, kBlockWidth, kBlockHeight, 1, 0, stream,
                                  arguments.data(), nullptr));
}

}  // namespace glip
