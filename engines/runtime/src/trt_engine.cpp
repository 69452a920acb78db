#include "trt_engine.hpp"

#include <algorithm>

#include "backend.hpp"
#include "cache.hpp"
#include "glip/glip.hpp"
#include "sha256.hpp"
#include "shared_library.hpp"

namespace glip {
namespace {

const char* const kPlugin[] = {"ModulatedDeformConv", "3", "glip"};  // name, version of its interface, namespace
#ifdef GLIP_RTX
const char *const kFlavor = "tensorrt-rtx", *const kName = "TensorRT-RTX ", *const kLibrary = "libtensorrt_rtx.so.";
const int kServed = 2;  ///< how many numbers of its version a library shares with the headers
#else
const char *const kFlavor = "tensorrt", *const kName = "TensorRT ", *const kLibrary = "libnvinfer.so.";
const int kServed = 1;
#endif

[[noreturn]] void refuse(const std::string& message) { throw Error(ErrorKind::missing, message); }

/// Keeps the last error for a message; nothing is printed.
class Logger : public nvinfer1::ILogger {
 public:
  void log(Severity severity, const char* message) noexcept override {
    if (severity > Severity::kERROR || !message) return;
    try {
      const std::lock_guard<std::mutex> lock(mutex_);
      last_ = message;
    } catch (...) {  // without the reason, then
    }
  }

  std::string last() {
    const std::lock_guard<std::mutex> lock(mutex_);
    std::string out = last_.substr(0, 200);
    std::replace(out.begin(), out.end(), '\n', ' ');
    return out;
  }

 private:
  std::mutex mutex_;
  std::string last_;
};

Logger& the_logger() {
  static auto* const logger = new Logger;  // never freed: TensorRT keeps it
  return *logger;
}

/// As much of a version as has to be that of the headers.
std::string served(const std::string& version) {
  std::size_t end = version.find('.');
  for (int i = 1; i < kServed && end != std::string::npos; ++i) end = version.find('.', end + 1);
  return version.substr(0, end);
}

}  // namespace

TensorRt& TensorRt::of(const EngineRecord& record) {
  const std::string headers = served(std::to_string(NV_TENSORRT_MAJOR) + "." + std::to_string(NV_TENSORRT_MINOR) + ".");
  const std::string wanted = record.flavor + " " + record.version;
  if (served(record.version) != headers) {
    refuse("engines " + record.folder + " were built by " + wanted + ", this library was compiled for " + kName + headers +
           "; compile it with the headers of " + wanted + ", or build engines with " + kName + headers);
  }
  static const std::unique_ptr<TensorRt> opened(new TensorRt(record.version));  // again after an exception
  return *opened;
}

TensorRt::TensorRt(const std::string& wanted) {
  const std::string major = std::to_string(NV_TENSORRT_MAJOR), advice = "install it, or name its folder in LD_LIBRARY_PATH";
  const std::string flavor = std::string(kFlavor) + " ";
  const auto library = SharedLibrary::open(flavor + wanted + " is not installed", {kLibrary + major}, advice);
  using Number = std::int32_t (*)();
  number_ = library.function<Number>("getInferLibVersion")();
#if GLIP_INTERFACE < 1000
  version_ = std::to_string(number_ / 1000) + "." + std::to_string(number_ / 100 % 10) + "." + std::to_string(number_ % 100);
#else
  version_ = std::to_string(number_ / 10000) + "." + std::to_string(number_ / 100 % 100) + "." + std::to_string(number_ % 100);
  version_ += "." + std::to_string(library.function<Number>("getInferLibBuildVersion")());
#endif
  if (served(version_) != served(wanted)) {  // before an object of it is used, whose functions may be elsewhere
    refuse(flavor + version_ + " is installed, and the engines were built by " + flavor + wanted +
           "; install that, or build them again");
  }
  const auto create = library.function<void* (*)(void*, std::int32_t)>("createInferRuntime_INTERNAL");
  const auto registry = library.function<nvinfer1::IPluginRegistry* (*)()>("getPluginRegistry");
#ifndef GLIP_RTX
  // NVIDIA's own plugins, which engines do without unless the builder chose one.
  if (SharedLibrary::try_open("libnvinfer_plugin.so." + major)) {
    const auto plugins = SharedLibrary::open("", {"libnvinfer_plugin.so." + major}, advice);
    const auto start = reinterpret_cast<bool (*)(void*, const char*)>(plugins.find("initLibNvInferPlugins"));
    if (start) start(&the_logger(), "");
  }
#endif
  // The version of the library itself: which functions it may be asked for is decided here, by `number_`.
  runtime_ = static_cast<nvinfer1::IRuntime*>(create(&the_logger(), number_));
  registry_ = registry();
  if (!runtime_ || !registry_) {
    throw Error(ErrorKind::backend, flavor + version_ + " cannot start" + reason() +
                                        "; see whether nvidia-smi names the GPU and a driver for its CUDA");
  }
}

std::string TensorRt::reason() const {
  const std::string last = the_logger().last();
  return last.empty() ? "" : " (" + last + ")";
}

void TensorRt::load_plugin(const std::string& file) {
  const std::lock_guard<std::recursive_mutex> lock(device_mutex());
#if GLIP_INTERFACE < 1000
  const bool known = registry_->getPluginCreator(kPlugin[0], kPlugin[1], kPlugin[2]) != nullptr;
#else
  const bool known = registry_->getCreator(kPlugin[0], kPlugin[1], kPlugin[2]) != nullptr;
#endif
  if (!known && !registry_->loadLibrary(file.c_str())) {
    refuse("plugin library " + file + " cannot be loaded" + reason() + "; build the engines again with glip-build");
  }
}

nvinfer1::ICudaEngine* TensorRt::load(const std::string& plan) {
  const std::lock_guard<std::recursive_mutex> lock(device_mutex());
  return runtime_->deserializeCudaEngine(plan.data(), plan.size());
}

std::size_t bytes_of(nvinfer1::DataType type) {
  switch (type) {
    case nvinfer1::DataType::kBOOL:
    case nvinfer1::DataType::kUINT8:
      return 1;
    case nvinfer1::DataType::kHALF:
      return 2;
    case nvinfer1::DataType::kFLOAT:
    case nvinfer1::DataType::kINT32:
      return 4;
#if GLIP_INTERFACE >= 1000
    case nvinfer1::DataType::kBF16:
      return 2;
    case nvinfer1::DataType::kINT64:
      return 8;
#endif
    default:
      refuse("an engine has an input or output of type " + std::to_string(static_cast<int>(type)) +
             ", which this library does not know; build the engines again with glip-build");
  }
}

Engine::Engine(TensorRt& tensorrt, const EngineRecord& record, const std::string& graph,
               [[maybe_unused]] const std::string& cache_folder, [[maybe_unused]] const Gpu& gpu)
    : file_(record.file(graph + ".plan")), profiles_(record.engines.at(graph + ".plan").profiles), number_(tensorrt.number()) {
  const std::string plan = read_file(file_);
  if (sha256_hex(plan) != record.engines.at(graph + ".plan").sha256) {  // what was checked before may have been replaced
    refuse(file_ + " was changed while it was opened; build it again with glip-build");
  }
  engine_.reset(tensorrt.load(plan));
  if (!engine_) {
    refuse(file_ + " cannot be loaded" + tensorrt.reason() + "; build it again with glip-build, adding --overwrite");
  }
  for (int i = 0; i < engine_->getNbIOTensors(); ++i) {
    const std::string name = engine_->getIOTensorName(i);
    const bool reads = engine_->getTensorIOMode(name.c_str()) == nvinfer1::TensorIOMode::kINPUT;
    (reads ? inputs : outputs).push_back(name);
    types[name] = engine_->getTensorDataType(name.c_str());
    bytes_of(types[name]);
  }
#ifdef GLIP_RTX
  cache_folder_ = cache_folder;
  kernels_key_ = kernels_key(record.engines.at(graph + ".plan").sha256, tensorrt.version(), gpu.name);
  configure(kFlavor + (" " + tensorrt.version()));
#endif
#if GLIP_INTERFACE >= 1001
  if (sizes_memory()) {
    memory_bytes = static_cast<std::size_t>(engine_->getDeviceMemorySizeV2());
    return;
  }
#endif
#if GLIP_INTERFACE < 1100 && !defined(GLIP_RTX)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wdeprecated-declarations"
  memory_bytes = engine_->getDeviceMemorySize();
#pragma GCC diagnostic pop
#endif
}

/// From 10.1 on, functions that count memory in 64 bits replace those before.
bool Engine::sizes_memory() const {
#ifdef GLIP_RTX
  return true;
#else
  return number_ >= 100100;
#endif
}

std::unique_ptr<nvinfer1::IExecutionContext> Engine::context(CUdeviceptr memory) const {
  auto* const address = reinterpret_cast<void*>(memory);
#ifdef GLIP_RTX
  std::unique_ptr<nvinfer1::IExecutionContext> made(engine_->createExecutionContext(config_.get()));
#elif GLIP_INTERFACE < 1000
  std::unique_ptr<nvinfer1::IExecutionContext> made(engine_->createExecutionContextWithoutDeviceMemory());
#else
  std::unique_ptr<nvinfer1::IExecutionContext> made(
      engine_->createExecutionContext(nvinfer1::ExecutionContextAllocationStrategy::kUSER_MANAGED));
#endif
  if (!made) return made;
#if GLIP_INTERFACE >= 1001
  if (sizes_memory()) {
    made->setDeviceMemoryV2(address, static_cast<std::int64_t>(memory_bytes));
    return made;
  }
#endif
#ifndef GLIP_RTX
  made->setDeviceMemory(address);
#endif
  return made;
}

// -- TensorRT-RTX -------------------------------------------------------------------------------------------------------------

#ifdef GLIP_RTX
/// Prepare the settings of contexts.
void Engine::configure(const std::string& tensorrt) {
  config_.reset(engine_->createRuntimeConfig());
  if (!config_) throw Error(ErrorKind::backend, file_ + ": " + tensorrt + " makes no settings of contexts; install it again");
  config_->setExecutionContextAllocationStrategy(nvinfer1::ExecutionContextAllocationStrategy::kUSER_MANAGED);
  // Otherwise kernels for the shapes that are met are compiled in the background, and a CUDA graph recorded meanwhile would
  // keep the fallback kernels.
  config_->setDynamicShapesKernelSpecializationStrategy(nvinfer1::DynamicShapesKernelSpecializationStrategy::kEAGER);
  cache_.reset(config_->createRuntimeCache());
  if (!cache_) return;  // kernels are compiled in every process, then
  if (const auto known = read_kernels(cache_folder_, kernels_key_)) {
    if (cache_->deserialize(known->data(), known->size())) kernels_ = *known;  // not another driver's: compiled again
  }
  if (!config_->setRuntimeCache(*cache_)) cache_.reset();
}

void Engine::keep_kernels() noexcept {
  if (!cache_ || cache_folder_.empty()) return;
  try {
    const std::unique_ptr<nvinfer1::IHostMemory> content(cache_->serialize());
    if (!content || content->size() == 0) return;
    std::string kernels(static_cast<const char*>(content->data()), content->size());
    if (kernels == kernels_) return;
    write_kernels(cache_folder_, kernels_key_, kernels);
    kernels_ = std::move(kernels);
  } catch (...) {  // no memory: compiled again by the next process, then
  }
}
#else
void Engine::keep_kernels() noexcept {}
#endif

namespace {

template <typename Context>
auto asked(const Context& context, CUstream stream, int) -> decltype(context.isStreamCapturable(stream)) {
  return context.isStreamCapturable(stream);
}

template <typename Context>
bool asked(const Context&, CUstream, long) {  // headers without that function
  return true;
}

}  // namespace

bool is_capturable(const nvinfer1::IExecutionContext& context, CUstream stream) { return asked(context, stream, 0); }

}  // namespace glip
