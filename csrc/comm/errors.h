// What Python sees of the core's exceptions: pypar.PeerError and ValueError, also when they pass through the autograd
// engine or a Future, which carry only C++ exceptions.
#pragma once

#include <exception>
#include <optional>
#include <string>
#include <utility>

#include <torch/csrc/Exceptions.h>

#include "comm/interrupt.h"
#include "comm/types.h"

namespace pypar {

// Becomes pypar.PeerError where torch turns C++ exceptions into Python ones.
struct PythonPeerError : torch::PyTorchError {
  using torch::PyTorchError::PyTorchError;
  PyObject* python_type() override;
};

// Rethrows the exception in flight as one that Python sees with the right type.
[[noreturn]] void rethrow_for_python();
// The same, as a pointer to keep.
std::exception_ptr for_python(const std::exception_ptr& error);

// Runs fn. Every op and every method of the process group that calls the core does it in here.
template <typename Fn>
decltype(auto) with_python_errors(Fn&& fn) {
  try {
    return std::forward<Fn>(fn)();
  } catch (const std::exception&) {
    rethrow_for_python();
  }
}

// No GIL in this scope, if this thread has it: torch keeps it in some calls, and a wait must not stop Python's threads.
class WithoutGil {
 public:
  WithoutGil() {
    if (Py_IsInitialized() && PyGILState_Check()) released_.emplace();
  }

 private:
  std::optional<pybind11::gil_scoped_release> released_;
};

// For functions that pybind11 calls without torch's own handler.
void register_exception_translator();
// From now on, a wait of Python's main thread ends when a signal handler raises.
void watch_signals();

}  // namespace pypar
