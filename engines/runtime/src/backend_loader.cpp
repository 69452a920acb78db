#include <dlfcn.h>

#include <filesystem>

#include "backend.hpp"

namespace glip {

std::unique_ptr<Backend> open_backend(const std::string& name, const Bundle& bundle, const BackendOptions& options) {
  if (name != "openvino") throw Error(ErrorKind::option, "backend \"" + name + "\" is unknown; legal is openvino");
  // The module lies beside this library. It stays open: code of a module may still be running when a detector ends.
  Dl_info here{};
  ::dladdr(reinterpret_cast<const void*>(&open_backend), &here);
  const std::string file = "libglip_" + name + ".so";
  const auto beside = std::filesystem::path(here.dli_fname ? here.dli_fname : "").parent_path() / file;
  void* module = ::dlopen(beside.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (!module) {
    const char* reason = ::dlerror();
    throw Error(ErrorKind::missing, "backend " + name + " cannot be loaded (" + (reason ? reason : "unknown reason") +
                                        "); build it with the library that it needs, and keep it beside libglip.so");
  }
  const auto open = reinterpret_cast<OpenBackend>(::dlsym(module, kOpenBackend));
  if (!open) throw Error(ErrorKind::missing, file + " is of another version; build and install them together");
  return std::unique_ptr<Backend>(open(bundle, options));
}

}  // namespace glip
