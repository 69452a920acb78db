// The border of the library: whatever is thrown inside leaves it as an Error.
#pragma once

#include <exception>
#include <new>

#include "glip/glip.hpp"

namespace glip {

/// Return what a body returns; what it throws that is no Error becomes one.
template <typename Body>
auto guarded(Body body) -> decltype(body()) {
  try {
    return body();
  } catch (const Error&) {
    throw;
  } catch (const std::bad_alloc&) {
    throw Error(ErrorKind::internal, "there is not enough memory; close other programs, or lower the longest side");
  } catch (const std::exception& error) {
    throw Error(ErrorKind::internal, std::string(error.what()) + "; please report it");
  }
}

}  // namespace glip
