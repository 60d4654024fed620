#pragma once

namespace pypar {

template <typename Body>
auto with_python_errors(Body&& body) {
  return body();
}

}  // namespace pypar
