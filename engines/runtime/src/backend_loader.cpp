#include <dlfcn.h>

#include <algorithm>
#include <filesystem>

#include "backend.hpp"

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
    {"tensorrt", false, "glip-build --precision", "the headers of TensorRT and CUDA"},
};

std::string names_of(bool data_only, const std::string& between) {
  std::string out;
  for (const Known& known : kBackends) {
    if (known.data_only || !data_only) out += (out.empty() ? "" : between) + known.name;
  }
  return out;
}

}  // namespace

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
  // The module lies beside this library. It stays open: code of a module may still be running when a detector ends.
  Dl_info here{};
  ::dladdr(reinterpret_cast<const void*>(&open_backend), &here);
  const std::string file = "libglip_" + name + ".so";
  const auto beside = std::filesystem::path(here.dli_fname ? here.dli_fname : "").parent_path() / file;
  void* module = ::dlopen(beside.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (!module) {
    const char* reason = ::dlerror();
    throw Error(ErrorKind::missing, "backend " + name + " cannot be loaded (" + (reason ? reason : "unknown reason") +
                                        "); build it with " + known->library + ", and keep it beside libglip.so");
  }
  const auto open = reinterpret_cast<OpenBackend>(::dlsym(module, kOpenBackend));
  if (!open) throw Error(ErrorKind::missing, file + " is of another version; build and install them together");
  return std::unique_ptr<Backend>(open(bundle, options));
}

}  // namespace glip
