// The little of CUDA that a backend needs: the driver's interface, opened at run time, so that nothing is linked with it.
//
// A thread has a current context. Where the application already made one it is the one used; otherwise the device's primary
// context, which CUDA's runtime library and others share. Calls may come from any thread, so work is done while a
// Cuda::Active lives, which makes that context current and puts the thread's own back.
#pragma once

#include <cuda.h>

#include <cstddef>
#include <functional>
#include <memory>
#include <string>

#include "engines.hpp"
#include "frames.hpp"

namespace glip {

struct CudaFunctions;

/// One GPU, with the context that was current, or its primary one.
class Cuda {
 public:
  /// Throws Error(missing) where there is no driver, Error(backend) where it fails.
  Cuda();
  ~Cuda();
  Cuda(const Cuda&) = delete;
  Cuda& operator=(const Cuda&) = delete;

  class Active {
   public:
    explicit Active(const Cuda& cuda);
    ~Active();
    Active(const Active&) = delete;
    Active& operator=(const Active&) = delete;

   private:
    const Cuda& cuda_;
  };

  /// A new stream that waits for no other.
  CUstream stream() const;
  void free_stream(CUstream stream) const noexcept;
  void synchronize(CUstream stream) const;

  CUdeviceptr allocate(std::size_t bytes) const;
  void free(CUdeviceptr address) const noexcept;
  /// Page-locked memory, which the GPU copies from and to by itself.
  void* pinned(std::size_t bytes) const;
  void free_pinned(void* memory) const noexcept;

  /// Enqueue a copy from or to page-locked memory.
  void upload(CUdeviceptr target, const void* source, std::size_t bytes, CUstream stream) const;
  void download(void* target, CUdeviceptr source, std::size_t bytes, CUstream stream) const;

  /// Record what `work` enqueues as a graph; null if something in it cannot be recorded.
  CUgraphExec capture(CUstream stream, const std::function<void()>& work) const;
  void launch(CUgraphExec graph, CUstream stream) const;
  void free_graph(CUgraphExec graph) const noexcept;

  /// Compile what `resize` needs, the first time; throws Error(missing) where no NVRTC compiles it for this GPU, with what to
  /// do `instead` of installing one.
  void prepare_resize(const std::string& instead) const;
  /// Enqueue resize.cu: a picture in GPU memory, resized as Pillow does (to one gray level), to the top left of a BGR canvas of
  /// (height, width, 3) bytes, zero around it.
  void resize(const ImageView& picture, CUdeviceptr canvas, Size canvas_size, Size size, CUstream stream) const;

  const Gpu& gpu() const { return gpu_; }

 private:
  void call(CUresult result) const;

  const CudaFunctions& functions_;
  CUdevice device_ = 0;
  CUcontext context_ = nullptr;
  bool primary_ = false;
  int driver_ = 0;  ///< newest CUDA version that the driver knows: 12040 for 12.4
  Gpu gpu_;
  // Of resize.cu, set by the first use. Those who share this object hold a mutex of their own then.
  mutable CUmodule module_ = nullptr;
  mutable CUfunction resize_ = nullptr, resize_nv12_ = nullptr;
};

}  // namespace glip
