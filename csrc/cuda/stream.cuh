// The stream that torch computes on: the one place that needs c10's CUDA library. The tests' twin is
// tests/kernels/emulation/cuda/stream.cuh.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

namespace pypar {

// Makes the tensor's device current while it lives.
using DeviceGuard = c10::cuda::CUDAGuard;

inline cudaStream_t current_stream(const at::Tensor& x) {
  return c10::cuda::getCurrentCUDAStream(x.get_device()).stream();
}

}  // namespace pypar
