// What gives the tests a multicast address for a channel: a GPU's come from torch's symmetric memory.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include "multicast.h"

namespace emulation {

inline int64_t multicast(const at::Tensor& pointers, int64_t bytes) {
  return add_multicast(pointers.const_data_ptr<int64_t>(), pointers.numel(), bytes);
}

}  // namespace emulation

TORCH_LIBRARY(pypar_cuda_emulated, m) {
  m.def("multicast(Tensor pointers, int bytes) -> int", emulation::multicast);
}
