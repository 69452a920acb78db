#include "shared_library.hpp"

#include <dlfcn.h>

#include "glip/glip.hpp"

namespace glip {
namespace {

std::string reason_of_dl() {
  const char* reason = ::dlerror();
  return reason ? reason : "unknown reason";
}

}  // namespace

void* SharedLibrary::try_open(const std::string& name) { return ::dlopen(name.c_str(), RTLD_NOW | RTLD_LOCAL); }

SharedLibrary SharedLibrary::open(const std::string& what, const std::vector<std::string>& names, const std::string& advice) {
  SharedLibrary out;
  out.advice_ = advice;
  std::string reason;
  for (const std::string& name : names) {
    out.name_ = name;
    out.handle_ = try_open(name);
    if (out.handle_) return out;
    reason += (reason.empty() ? "" : "; ") + reason_of_dl();
  }
  throw Error(ErrorKind::missing, what + " (" + reason + "); " + advice);
}

void* SharedLibrary::find(const char* symbol) const { return ::dlsym(handle_, symbol); }

void* SharedLibrary::address(const char* symbol) const {
  void* found = find(symbol);
  if (!found) throw Error(ErrorKind::missing, name_ + " is too old or damaged: it lacks " + symbol + "; " + advice_);
  return found;
}

}  // namespace glip
