// What every inference engine looks like to the detector. Engines are modules of their own, opened at run time.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "bundle.hpp"
#include "frames.hpp"
#include "select.hpp"

namespace glip {

struct BackendOptions {
  std::string precision, cache_folder;
  int threads = 0;
  std::string engines;  ///< a folder, or its name in the bundle; empty for the first that may run here
  bool trusted = true, plugins = true;
  std::vector<std::string> folders = {};  ///< of engines, by `engines`: those that a module of TensorRT chooses from
};

/// What the image branch takes of a prompt.
struct PromptInput {
  const std::vector<float>& embedding;  ///< (tokens, width), from the text branch
  const std::vector<float>& class_map;  ///< (classes, tokens); row c averages the tokens of class c
  std::size_t tokens, classes;
};

class Backend {
 public:
  virtual ~Backend() = default;
  /// (tokens, width) of the ids.
  virtual std::vector<float> encode_text(const std::vector<std::int64_t>& ids) = 0;
  /// Run the image branch, what the text does not change only once: candidates by prompt and by picture.
  virtual std::vector<std::vector<Candidates>> detect(const Canvas& canvas, const std::vector<PromptInput>& prompts) = 0;
  /// Another backend on the same compiled graphs, with buffers of its own.
  virtual std::unique_ptr<Backend> clone() const = 0;
  /// Whether a canvas may have its pictures in CUDA memory.
  virtual bool reads_cuda() const { return false; }
  /// Get ready to resize pictures of the host on the GPU; false where this backend cannot. Throws Error(missing) where it
  /// could, and lacks something for it.
  virtual bool prepare_resize() { return false; }
  /// What makes its embeddings others than those of the text graph in fp32; empty if nothing does.
  virtual std::string text_key() const = 0;
};

/// Held by modules while contexts and buffers of a GPU are made or given back and while a CUDA graph is recorded, in the whole
/// process: allocating in one thread breaks the recording of another, in every capture mode (NVIDIA/TensorRT issue 2888).
GLIP_API std::recursive_mutex& device_mutex();

/// The one function of a module; it throws Error.
using OpenBackend = Backend* (*)(const Bundle& bundle, const BackendOptions& options);
constexpr const char* kOpenBackend = "glip_open_backend";

/// Open the module of a backend; throws Error(missing) where it, or the library that it needs, is not there.
std::unique_ptr<Backend> open_backend(const std::string& name, const Bundle& bundle, const BackendOptions& options);

}  // namespace glip
