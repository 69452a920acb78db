// Libraries of inference engines that are opened at run time.
#pragma once

#include <string>
#include <vector>

namespace glip {

/// A shared library that is opened at run time and stays open.
class SharedLibrary {
 public:
  /// Open the first of some names that can be; throws Error(missing) with `advice` where there is none.
  static SharedLibrary open(const std::string& what, const std::vector<std::string>& names, const std::string& advice);
  /// Null where there is none.
  static void* try_open(const std::string& name);

  /// A function; throws Error(missing) where the library lacks it.
  template <typename Function>
  Function function(const char* symbol) const {
    return reinterpret_cast<Function>(address(symbol));
  }
  /// Null where the library lacks it.
  void* find(const char* symbol) const;

 private:
  void* address(const char* symbol) const;
  void* handle_ = nullptr;
  std::string name_, advice_;
};

}  // namespace glip
