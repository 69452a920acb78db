// What the runtime uses of TensorRT-RTX, for tests on machines without its headers: names and types are those of its interface,
// the layout is not. Both sides of the tests are compiled with this; no TensorRT-RTX can be used with it.
#pragma once

#include <cuda.h>

#include <cstddef>
#include <cstdint>

#include "NvInferVersion.h"

#define NV_TENSORRT_MAJOR TRT_MAJOR_RTX
#define NV_TENSORRT_MINOR TRT_MINOR_RTX
#define NV_TENSORRT_VERSION (NV_TENSORRT_MAJOR * 10000 + NV_TENSORRT_MINOR * 100 + TRT_PATCH_RTX)

using cudaStream_t = CUstream;

namespace nvinfer1 {

enum class DataType : std::int32_t { kFLOAT, kHALF, kINT8, kINT32, kBOOL, kUINT8, kFP8, kBF16, kINT64 };
enum class TensorIOMode : std::int32_t { kNONE, kINPUT, kOUTPUT };
enum class ExecutionContextAllocationStrategy : std::int32_t { kSTATIC, kON_PROFILE_CHANGE, kUSER_MANAGED };
enum class DynamicShapesKernelSpecializationStrategy : std::int32_t { kLAZY, kEAGER, kNONE };

struct Dims {
  std::int32_t nbDims;
  std::int64_t d[8];
};

class ILogger {
 public:
  enum class Severity : std::int32_t { kINTERNAL_ERROR, kERROR, kWARNING, kINFO, kVERBOSE };
  virtual void log(Severity severity, const char* message) noexcept = 0;
  virtual ~ILogger() = default;
};

class IPluginCreatorInterface;

class IPluginRegistry {
 public:
  virtual IPluginCreatorInterface* getCreator(const char* name, const char* version, const char* space) noexcept = 0;
  virtual void* loadLibrary(const char* file) noexcept = 0;

 protected:
  ~IPluginRegistry() = default;
};

class ICudaEngine;
class IExecutionContext;
class IHostMemory;
class IRuntimeCache;
class IRuntimeConfig;

namespace apiv {

class VHostMemory {
 public:
  virtual void* data() const noexcept = 0;
  virtual std::size_t size() const noexcept = 0;

 protected:
  ~VHostMemory() = default;
};

class VRuntimeCache {
 public:
  virtual IHostMemory* serialize() const noexcept = 0;
  virtual bool deserialize(const void* content, std::size_t size) noexcept = 0;

 protected:
  ~VRuntimeCache() = default;
};

class VRuntimeConfig {
 public:
  virtual void setExecutionContextAllocationStrategy(ExecutionContextAllocationStrategy strategy) noexcept = 0;
  virtual IRuntimeCache* createRuntimeCache() const noexcept = 0;
  virtual bool setRuntimeCache(const IRuntimeCache& cache) noexcept = 0;
  virtual void setDynamicShapesKernelSpecializationStrategy(DynamicShapesKernelSpecializationStrategy strategy) noexcept = 0;

 protected:
  ~VRuntimeConfig() = default;
};

class VExecutionContext {
 public:
  virtual bool setOptimizationProfileAsync(std::int32_t index, cudaStream_t stream) noexcept = 0;
  virtual bool setInputShape(const char* name, const Dims& dims) noexcept = 0;
  virtual std::int32_t inferShapes(std::int32_t count, const char** names) noexcept = 0;
  virtual Dims getTensorShape(const char* name) const noexcept = 0;
  virtual bool setTensorAddress(const char* name, void* address) noexcept = 0;
  virtual void setDeviceMemoryV2(void* memory, std::int64_t size) noexcept = 0;
  virtual bool enqueueV3(cudaStream_t stream) noexcept = 0;
  virtual bool isStreamCapturable(cudaStream_t stream) const noexcept = 0;

 protected:
  ~VExecutionContext() = default;
};

class VCudaEngine {
 public:
  virtual std::int32_t getNbIOTensors() const noexcept = 0;
  virtual const char* getIOTensorName(std::int32_t index) const noexcept = 0;
  virtual TensorIOMode getTensorIOMode(const char* name) const noexcept = 0;
  virtual DataType getTensorDataType(const char* name) const noexcept = 0;
  virtual std::int64_t getDeviceMemorySizeV2() const noexcept = 0;
  virtual IRuntimeConfig* createRuntimeConfig() noexcept = 0;
  virtual IExecutionContext* createExecutionContextWithRuntimeConfig(IRuntimeConfig* config) noexcept = 0;

 protected:
  ~VCudaEngine() = default;
};

class VRuntime {
 public:
  virtual ICudaEngine* deserializeCudaEngine(const void* plan, std::size_t size) noexcept = 0;

 protected:
  ~VRuntime() = default;
};

}  // namespace apiv

class IHostMemory {
 public:
  virtual ~IHostMemory() noexcept = default;
  void* data() const noexcept { return mImpl->data(); }
  std::size_t size() const noexcept { return mImpl->size(); }

 protected:
  apiv::VHostMemory* mImpl;
};

class IRuntimeCache {
 public:
  virtual ~IRuntimeCache() noexcept = default;
  IHostMemory* serialize() const noexcept { return mImpl->serialize(); }
  bool deserialize(const void* content, std::size_t size) noexcept { return mImpl->deserialize(content, size); }

 protected:
  apiv::VRuntimeCache* mImpl;
};

class IRuntimeConfig {
 public:
  virtual ~IRuntimeConfig() noexcept = default;
  void setExecutionContextAllocationStrategy(ExecutionContextAllocationStrategy strategy) noexcept {
    mImpl->setExecutionContextAllocationStrategy(strategy);
  }
  IRuntimeCache* createRuntimeCache() const noexcept { return mImpl->createRuntimeCache(); }
  bool setRuntimeCache(const IRuntimeCache& cache) noexcept { return mImpl->setRuntimeCache(cache); }
  void setDynamicShapesKernelSpecializationStrategy(DynamicShapesKernelSpecializationStrategy strategy) noexcept {
    mImpl->setDynamicShapesKernelSpecializationStrategy(strategy);
  }

 protected:
  apiv::VRuntimeConfig* mImpl;
};

class IExecutionContext {
 public:
  virtual ~IExecutionContext() noexcept = default;
  bool setOptimizationProfileAsync(std::int32_t index, cudaStream_t stream) noexcept {
    return mImpl->setOptimizationProfileAsync(index, stream);
  }
  bool setInputShape(const char* name, const Dims& dims) noexcept { return mImpl->setInputShape(name, dims); }
  std::int32_t inferShapes(std::int32_t count, const char** names) noexcept { return mImpl->inferShapes(count, names); }
  Dims getTensorShape(const char* name) const noexcept { return mImpl->getTensorShape(name); }
  bool setTensorAddress(const char* name, void* address) noexcept { return mImpl->setTensorAddress(name, address); }
  void setDeviceMemoryV2(void* memory, std::int64_t size) noexcept { mImpl->setDeviceMemoryV2(memory, size); }
  bool enqueueV3(cudaStream_t stream) noexcept { return mImpl->enqueueV3(stream); }
  bool isStreamCapturable(cudaStream_t stream) const noexcept { return mImpl->isStreamCapturable(stream); }

 protected:
  apiv::VExecutionContext* mImpl;
};

class ICudaEngine {
 public:
  virtual ~ICudaEngine() noexcept = default;
  std::int32_t getNbIOTensors() const noexcept { return mImpl->getNbIOTensors(); }
  const char* getIOTensorName(std::int32_t index) const noexcept { return mImpl->getIOTensorName(index); }
  TensorIOMode getTensorIOMode(const char* name) const noexcept { return mImpl->getTensorIOMode(name); }
  DataType getTensorDataType(const char* name) const noexcept { return mImpl->getTensorDataType(name); }
  std::int64_t getDeviceMemorySizeV2() const noexcept { return mImpl->getDeviceMemorySizeV2(); }
  IRuntimeConfig* createRuntimeConfig() noexcept { return mImpl->createRuntimeConfig(); }
  IExecutionContext* createExecutionContext(IRuntimeConfig* config) noexcept {
    return mImpl->createExecutionContextWithRuntimeConfig(config);
  }

 protected:
  apiv::VCudaEngine* mImpl;
};

class IRuntime {
 public:
  virtual ~IRuntime() noexcept = default;
  ICudaEngine* deserializeCudaEngine(const void* plan, std::size_t size) noexcept {
    return mImpl->deserializeCudaEngine(plan, size);
  }

 protected:
  apiv::VRuntime* mImpl;
};

}  // namespace nvinfer1
