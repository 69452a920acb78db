#include <dlfcn.h>

#include <algorithm>
#include <filesystem>
#include <optional>

#include "backend.hpp"
#include "engines.hpp"

namespace glip {
namespace {

/// Backends, and whether all of a bundle is data to them; the others run native code that a bundle may hold.
struct Known {
  const char* name;
  bool data_only;
  const char* precision;  ///< what chooses the precision; empty where the backend does itself
  const char* library;
};
constexpr Known kBackends[] = {
    {"openvino", true, "", "OpenVINO"},
    {"onnxruntime", true, "glip-export --precision", "the headers of ONNX Runtime"},
    {"tensorrt", false, "glip-build --precision", ""},  // see open_engines
};

/// What builds engines, and the module that runs them.
struct Flavor {
  const char* name;
  const char* module;
  const char* library;
};
constexpr Flavor kFlavors[] = {{"tensorrt", "tensorrt", "TensorRT"}, {"tensorrt-rtx", "tensorrt_rtx", "TensorRT-RTX"}};

bool has_flavor(const std::string& folder, const std::string& flavor) {
  try {
    return EngineRecord::read(folder).flavor == flavor;
  } catch (const Error&) {
    return false;
  }
}

std::string names_of(bool data_only, const std::string& between) {
  std::string out;
  for (const Known& known : kBackends) {
    if (known.data_only || !data_only) out += (out.empty() ? "" : between) + known.name;
  }
  return out;
}

/// Open with a module, which lies beside this library; `what` and `library` are for the message that it is not there. It stays
/// open: code of a module may still be running when a detector ends.
std::unique_ptr<Backend> open_module(const std::string& name, const std::string& what, const std::string& library,
                                     const Bundle& bundle, const BackendOptions& options) {
  Dl_info here{};
  ::dladdr(reinterpret_cast<const void*>(&open_backend), &here);
  const std::string file = "libglip_" + name + ".so";
  const auto beside = std::filesystem::path(here.dli_fname ? here.dli_fname : "").parent_path() / file;
  void* module = ::dlopen(beside.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (!module) {
    const char* reason = ::dlerror();
    throw Error(ErrorKind::missing, what + " cannot be loaded (" + (reason ? reason : "unknown reason") + "); build it with " +
                                        library + ", and keep it beside libglip.so");
  }
  const auto open = reinterpret_cast<OpenBackend>(::dlsym(module, kOpenBackend));
  if (!open) throw Error(ErrorKind::missing, file + " is of another version; build and install them together");
  return std::unique_ptr<Backend>(open(bundle, options));
}

/// The first engines that may run here, in the order of their names. Those of each flavor have a module, which chooses among
/// as many as follow each other.
std::unique_ptr<Backend> open_engines(const Bundle& bundle, BackendOptions options) {
  const std::vector<std::string> candidates = candidate_engines(bundle, options.engines);
  std::optional<Error> refused;
  for (auto next = candidates.begin(); next != candidates.end();) {
    const std::string folder = *next++;
    try {
      const EngineRecord record = EngineRecord::read(folder);
      const auto flavor =
          std::find_if(std::begin(kFlavors), std::end(kFlavors), [&](const Flavor& one) { return one.name == record.flavor; });
      if (flavor == std::end(kFlavors)) {
        throw Error(ErrorKind::missing, "engines " + folder + " were built by " + record.flavor + " " + record.version +
                                            ", which this library does not run; build engines with glip-build --flavor"
                                            " tensorrt or tensorrt-rtx");
      }
      options.folders = {folder};
      for (; next != candidates.end() && has_flavor(*next, record.flavor); ++next) options.folders.push_back(*next);
      const std::string library = std::string("the headers of ") + flavor->library + " and CUDA";
      return open_module(flavor->module, std::string("backend ") + flavor->module, library, bundle, options);
    } catch (const Error& error) {
      if (error.kind() != ErrorKind::missing) throw;
      refused.emplace(error);
    }
  }
  throw Error(*refused);
}

}  // namespace

std::recursive_mutex& device_mutex() {
  static auto* const mutex = new std::recursive_mutex;
  return *mutex;
}

std::unique_ptr<Backend> open_backend(const std::string& name, const Bundle& bundle, const BackendOptions& options) {
  const auto* const known =
      std::find_if(std::begin(kBackends), std::end(kBackends), [&](const Known& one) { return one.name == name; });
  if (known == std::end(kBackends)) {
    throw Error(ErrorKind::option, "backend \"" + name + "\" is unknown; legal is " + names_of(false, ", "));
  }
  if (!known->data_only && !options.trusted) {
    throw Error(ErrorKind::option, "backend " + name +
                                       " runs native code that comes with the bundle, which is not trusted;"
                                       " use backend " +
                                       names_of(true, " or "));
  }
  if (*known->precision && options.precision != "f32") {
    throw Error(ErrorKind::option, "precision is \"" + options.precision + "\", which backend " + name +
                                       " cannot choose; use backend openvino, or " + known->precision);
  }
  if (!known->data_only) return open_engines(bundle, options);
  return open_module(name, "backend " + name, known->library, bundle, options);
}

}  // namespace glip
