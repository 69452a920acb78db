// Files that are shared with the Python package: encoded prompts, compiled graphs and kernels. A cache is never worth an error.
#pragma once

#include <list>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

namespace glip {

using Embedding = std::shared_ptr<const std::vector<float>>;

/// $GLIP_DEPLOY_CACHE, $XDG_CACHE_HOME/glip-deploy or ~/.cache/glip-deploy; empty where there is no home.
std::string cache_folder();

/// Embeddings by prompt: the 64 used last in memory, and files in the form of glip_deploy/prompts/cache.py.
class PromptCache {
 public:
  /// An empty folder keeps them in memory only. `key` is the bundle's.
  PromptCache(std::string folder, std::string key);
  /// Null if it is not known, with this number of rows.
  Embedding get(const std::vector<std::int64_t>& ids, std::size_t width);
  void put(const std::vector<std::int64_t>& ids, std::size_t width, const Embedding& embedding);

 private:
  void remember(const std::string& key, Embedding embedding);
  std::string folder_, key_;
  std::mutex mutex_;
  std::list<std::string> used_;
  std::map<std::string, Embedding> memory_;
};

/// Compiled graphs in the form of glip_deploy/backends/compiled.py; an empty folder keeps nothing.
std::optional<std::string> read_compiled(const std::string& folder, const std::string& key);
void write_compiled(const std::string& folder, const std::string& key, const std::string& data);

/// Kernels that TensorRT-RTX compiled for an engine (its SHA-256) on a GPU, in the files of glip_deploy/backends/trt_engine.py;
/// an empty folder keeps nothing. They are code: a folder that is another user's, or that everyone may write to, is not used.
std::string kernels_key(const std::string& engine, const std::string& version, const std::string& gpu);
std::optional<std::string> read_kernels(const std::string& folder, const std::string& key);
void write_kernels(const std::string& folder, const std::string& key, const std::string& data);

}  // namespace glip
