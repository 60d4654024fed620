#include <torch/extension.h>

PYBIND11_MODULE(_C, m) {}
