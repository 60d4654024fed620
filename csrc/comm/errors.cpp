#include "comm/errors.h"

#include <sys/syscall.h>
#include <unistd.h>

#include <c10/util/Exception.h>

namespace pypar {

PyObject* PythonPeerError::python_type() {
  pybind11::gil_scoped_acquire gil;
  // Kept for the life of the process: exceptions may be translated while modules are being torn down.
  static PyObject* type = pybind11::object(pybind11::module_::import("pypar.errors").attr("PeerError")).release().ptr();
  return type;
}

void rethrow_for_python() {
  try {
    throw;
  } catch (const PeerError& error) {
    throw PythonPeerError(error.what());
  } catch (const ArgumentError& error) {
    C10_THROW_ERROR(ValueError, error.what());
  } catch (const Interrupted& error) {
    std::rethrow_exception(error.cause);
  }
}

std::exception_ptr for_python(const std::exception_ptr& error) {
  try {
    try {
      std::rethrow_exception(error);
    } catch (...) {
      rethrow_for_python();
    }
  } catch (...) {
    return std::current_exception();
  }
}

void register_exception_translator() {
  pybind11::register_exception_translator([](std::exception_ptr pointer) {
    try {
      if (pointer) std::rethrow_exception(pointer);
    } catch (PythonPeerError& error) {
      PyErr_SetString(error.python_type(), error.what());
    } catch (const PeerError& error) {
      PyErr_SetString(PythonPeerError(error.what()).python_type(), error.what());
    } catch (const ArgumentError& error) {
      PyErr_SetString(PyExc_ValueError, error.what());
    }
  });
}

namespace {

// What a signal handler of Python raises, KeyboardInterrupt first of all. Only the main thread runs handlers; it never
// blocks on the GIL with a lock that is taken with the GIL held, see Communicator::check_interrupt.
std::exception_ptr raised_by_signal() {
  if (syscall(SYS_gettid) != getpid() || !Py_IsInitialized()) return nullptr;
  pybind11::gil_scoped_acquire gil;
  if (PyErr_Occurred() != nullptr || PyErr_CheckSignals() == 0) return nullptr;
  return std::make_exception_ptr(pybind11::error_already_set());
}

}  // namespace

void watch_signals() {
  set_interrupt_check(&raised_by_signal);
}

}  // namespace pypar
