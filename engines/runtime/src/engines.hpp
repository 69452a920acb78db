// What a folder of engines says of itself, `build.json`, and whether its engines may run here: glip_deploy/bundle/engines.py.
#pragma once

#include <array>
#include <cstdint>
#include <functional>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "bundle.hpp"

namespace glip {

using Shape = std::vector<std::int64_t>;
/// By input: smallest, best and largest shape.
using Profile = std::map<std::string, std::array<Shape, 3>>;

struct EngineFile {
  std::string sha256;
  std::uintmax_t bytes = 0;
  std::vector<Profile> profiles;
};

/// A GPU.
struct Gpu {
  std::string name;            ///< as the driver gives it
  int compute_capability = 0;  ///< 80 for 8.0
};

struct EngineRecord {
  /// Read the record of a folder; throws Error(missing) where there is none, or it is damaged or of a newer format.
  static EngineRecord read(const std::string& folder);

  /// Throw Error(missing) unless these engines may run here: the first thing that differs, and the command that builds again.
  /// `version` is that of the library of this flavor that is here. All files are hashed.
  void check(const Bundle& bundle, const std::string& version, const Gpu& gpu) const;

  std::string file(const std::string& name) const { return folder + "/" + name; }

  std::string folder, flavor, version, gpu, options, plugin, plugin_sha256, manifest_sha256;
  bool of_gpu = false;  ///< whether it was built on a GPU, the one called `gpu`
  int compute_capability = 0;
  std::map<std::string, EngineFile> engines;  ///< by file name: text.plan, image.plan; with --split backbone.plan, head.plan
};

/// The folders of engines that a bundle holds, by name; without those still being built.
std::vector<std::string> find_engines(const std::string& bundle);

/// What an engine's library is here: its version. Throws Error where it cannot be opened.
using LibraryVersion = std::function<std::string(const EngineRecord&)>;

/// The engines to choose from: those of `folder` (a path, or a name below the bundle's `engines`), or all of the bundle. Throws
/// Error(missing) where there are none.
std::vector<std::string> candidate_engines(const Bundle& bundle, const std::string& folder);

/// The first of some folders of engines that may run here. Throws Error(missing): why the last ones cannot run here.
EngineRecord choose_engines(const Bundle& bundle, const std::vector<std::string>& folders, bool plugins, const Gpu& gpu,
                            const LibraryVersion& version);

}  // namespace glip
