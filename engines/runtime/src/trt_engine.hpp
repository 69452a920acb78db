// TensorRT, opened at run time, and its engines; the differences between its versions are here. With GLIP_RTX it is
// TensorRT-RTX, in a module of its own.
//
// Classes of TensorRT are tables of functions whose order changes with its major version, so a build serves the major version
// of the headers that it was compiled with. Functions that came with a later minor version are used where the library is new
// enough. The tables of TensorRT-RTX change with its minor version too, and a build serves that one.
#pragma once

#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "cuda.hpp"
#include "engines.hpp"
#include "trt_interface.hpp"

namespace glip {

/// TensorRT's library, once a process: it keeps the first logger that it is given, and engines need their runtime.
class TensorRt {
 public:
  /// Open the library that engines of this module's flavor were built by; throws Error(missing) where it is not installed, or
  /// where this build is for another version.
  static TensorRt& of(const EngineRecord& record);

  /// Register the creators of a plugin library, unless they are registered. A second library with the same creator would be
  /// refused; the one that is there does the same.
  void load_plugin(const std::string& file);

  nvinfer1::ICudaEngine* load(const std::string& plan);

  /// What it logged last as an error, as ": ..." for a message, or nothing.
  std::string reason() const;

  const std::string& version() const { return version_; }
  /// As NV_TENSORRT_VERSION counts: 101401 for 10.14.1, 8601 for 8.6.1, 10701 for 1.7.1 of TensorRT-RTX.
  int number() const { return number_; }

 private:
  explicit TensorRt(const std::string& version);
  std::string version_;
  int number_ = 0;
  nvinfer1::IRuntime* runtime_ = nullptr;
  nvinfer1::IPluginRegistry* registry_ = nullptr;
};

/// Bytes of an element; throws Error(missing) for a type that no engine of a bundle has.
std::size_t bytes_of(nvinfer1::DataType type);

/// One engine, which clones share; each has its own contexts.
class Engine {
 public:
  /// `cache_folder` and `gpu` say where and for what kernels that TensorRT-RTX compiles are kept; an empty folder keeps none.
  /// Throws Error(missing) where the plan is not the one of the record, or cannot be loaded.
  Engine(TensorRt& tensorrt, const EngineRecord& record, const std::string& graph, const std::string& cache_folder,
         const Gpu& gpu);

  /// A new execution context, which computes in `memory`, of at least `memory_bytes`; of contexts that share it one runs at a
  /// time. Null where the GPU has not enough memory.
  std::unique_ptr<nvinfer1::IExecutionContext> context(CUdeviceptr memory) const;

  /// Write the kernels that TensorRT-RTX compiled for the shapes met so far, for the next process; never an error.
  void keep_kernels() noexcept;

  const std::string& file() const { return file_; }
  const std::vector<Profile>& profiles() const { return profiles_; }

  std::vector<std::string> inputs, outputs;
  std::map<std::string, nvinfer1::DataType> types;
  std::size_t memory_bytes = 0;

 private:
  bool sizes_memory() const;
  std::string file_;
  std::vector<Profile> profiles_;
  int number_ = 0;
  std::unique_ptr<nvinfer1::ICudaEngine> engine_;
#ifdef GLIP_RTX
  void configure(const std::string& tensorrt);
  std::string cache_folder_, kernels_key_, kernels_;  ///< kernels_: what the file has
  std::unique_ptr<nvinfer1::IRuntimeCache> cache_;
  std::unique_ptr<nvinfer1::IRuntimeConfig> config_;  ///< of every context
#endif
};

/// Whether the next run may be recorded as a CUDA graph: TensorRT-RTX can tell, from 1.5 on.
bool is_capturable(const nvinfer1::IExecutionContext& context, CUstream stream);

}  // namespace glip
