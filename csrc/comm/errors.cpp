#include "comm/errors.h"

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

}  // namespace pypar
