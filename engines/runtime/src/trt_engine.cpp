#include "trt_engine.hpp"

#include <algorithm>

#include "glip/glip.hpp"
#include "sha256.hpp"
#include "shared_library.hpp"

#define GLIP_HEADERS (NV_TENSORRT_MAJOR * 100 + NV_TENSORRT_MINOR)

#if GLIP_HEADERS < 806
#error "TensorRT 8.6 or newer is needed"
#endif

namespace glip {
namespace {

const char* const kPlugin[] = {"ModulatedDeformConv", "3", "glip"};  // name, version of its interface, namespace
const char* const kFlavor = "tensorrt";

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

std::string major_of(const std::string& version) { return version.substr(0, version.find('.')); }

}  // namespace

std::recursive_mutex& device_mutex() {
  static auto* const mutex = new std::recursive_mutex;
  return *mutex;
}

TensorRt& TensorRt::of(const EngineRecord& record) {
  const std::string headers = std::to_string(NV_TENSORRT_MAJOR), wanted = record.flavor + " " + record.version;
  if (record.flavor != kFlavor) {
    refuse("engines " + record.folder + " were built by " + wanted +
           ", which this library does not run; build engines with"
           " glip-build --flavor tensorrt, or run them with Python");
  }
  if (major_of(record.version) != headers) {
    refuse("engines " + record.folder + " were built by " + wanted + ", this library was compiled for TensorRT " + headers +
           "; compile it with the headers of " + wanted + ", or build engines with TensorRT " + headers);
  }
  static const std::unique_ptr<TensorRt> opened(new TensorRt(record.version));  // again after an exception
  return *opened;
}

TensorRt::TensorRt(const std::string& wanted) {
  const std::string major = std::to_string(NV_TENSORRT_MAJOR), advice = "install it, or name its folder in LD_LIBRARY_PATH";
  const auto library = SharedLibrary::open("tensorrt " + wanted + " is not installed", {"libnvinfer.so." + major}, advice);
  using Number = std::int32_t (*)();
  number_ = library.function<Number>("getInferLibVersion")();
#if NV_TENSORRT_MAJOR < 10
  version_ = std::to_string(number_ / 1000) + "." + std::to_string(number_ / 100 % 10) + "." + std::to_string(number_ % 100);
#else
  version_ = std::to_string(number_ / 10000) + "." + std::to_string(number_ / 100 % 100) + "." + std::to_string(number_ % 100);
  version_ += "." + std::to_string(library.function<Number>("getInferLibBuildVersion")());
#endif
  const auto create = library.function<void* (*)(void*, std::int32_t)>("createInferRuntime_INTERNAL");
  const auto registry = library.function<nvinfer1::IPluginRegistry* (*)()>("getPluginRegistry");
  // NVIDIA's own plugins, which engines do without unless the builder chose one.
  if (SharedLibrary::try_open("libnvinfer_plugin.so." + major)) {
    const auto plugins = SharedLibrary::open("", {"libnvinfer_plugin.so." + major}, advice);
    const auto start = reinterpret_cast<bool (*)(void*, const char*)>(plugins.find("initLibNvInferPlugins"));
    if (start) start(&the_logger(), "");
  }
  // The version of the library itself: which functions it may be asked for is decided here, by `number_`.
  runtime_ = static_cast<nvinfer1::IRuntime*>(create(&the_logger(), number_));
  registry_ = registry();
  if (!runtime_ || !registry_) {
    throw Error(ErrorKind::backend, "tensorrt " + version_ + " cannot start" + reason() +
                                        "; see whether nvidia-smi names the GPU and a driver for its CUDA");
  }
}

std::string TensorRt::reason() const {
  const std::string last = the_logger().last();
  return last.empty() ? "" : " (" + last + ")";
}

void TensorRt::load_plugin(const std::string& file) {
  const std::lock_guard<std::recursive_mutex> lock(device_mutex());
#if NV_TENSORRT_MAJOR < 10
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
#if NV_TENSORRT_MAJOR >= 10
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

Engine::Engine(TensorRt& tensorrt, const EngineRecord& record, const std::string& graph)
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
#if GLIP_HEADERS >= 1001
  if (sizes_memory()) {
    memory_bytes = static_cast<std::size_t>(engine_->getDeviceMemorySizeV2());
    return;
  }
#endif
#if NV_TENSORRT_MAJOR < 11
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wdeprecated-declarations"
  memory_bytes = engine_->getDeviceMemorySize();
#pragma GCC diagnostic pop
#endif
}

/// From 10.1 on, functions that count memory in 64 bits replace those before.
bool Engine::sizes_memory() const { return number_ >= 100100; }

std::unique_ptr<nvinfer1::IExecutionContext> Engine::context(CUdeviceptr memory) const {
  auto* const address = reinterpret_cast<void*>(memory);
#if NV_TENSORRT_MAJOR < 10
  std::unique_ptr<nvinfer1::IExecutionContext> made(engine_->createExecutionContextWithoutDeviceMemory());
#else
  std::unique_ptr<nvinfer1::IExecutionContext> made(
      engine_->createExecutionContext(nvinfer1::ExecutionContextAllocationStrategy::kUSER_MANAGED));
#endif
  if (!made) return made;
#if GLIP_HEADERS >= 1001
  if (sizes_memory()) {
    made->setDeviceMemoryV2(address, static_cast<std::int64_t>(memory_bytes));
    return made;
  }
#endif
  made->setDeviceMemory(address);
  return made;
}

}  // namespace glip
