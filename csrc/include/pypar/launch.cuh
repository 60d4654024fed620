// How the kernels are launched, and how they reach dynamic shared memory; nothing else in here. No <<<>>> in csrc/cuda:
// a plain C++ compiler can't parse it, and the tests run the same launchers on a CPU with the twin of this file,
// tests/kernels/emulation/pypar/launch.cuh.
#pragma once

#include <stdexcept>
#include <string>

#include <cuda_runtime.h>

namespace pypar {

// The block's dynamic shared memory.
template <typename T>
__device__ __forceinline__ T* dynamic_shared() {
  extern __shared__ __align__(16) unsigned char dynamic_shared_bytes[];
  return reinterpret_cast<T*>(dynamic_shared_bytes);
}

inline void check_cuda(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

// Runs kernel(params) on the stream. co_resident: its blocks wait for other GPUs, so all of them must run at the same
// time; a grid too large for that is refused by the driver instead of hanging.
template <typename Params>
void launch(void (*kernel)(Params), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream,
            const Params& params, bool co_resident) {
  void* arguments[] = {const_cast<Params*>(&params)};
  const void* function = reinterpret_cast<const void*>(kernel);
  check_cuda(co_resident ? cudaLaunchCooperativeKernel(function, grid, block, arguments, shared_bytes, stream)
                         : cudaLaunchKernel(function, grid, block, arguments, shared_bytes, stream),
             "launch of a kernel");
  check_cuda(cudaGetLastError(), "launch of a kernel");
}

// One copy by a copy engine, between any two GPUs that map each other's memory.
inline void copy_async(void* to, const void* from, size_t bytes, cudaStream_t stream) {
  if (bytes != 0) check_cuda(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDefault, stream), "copy between GPUs");
}

}  // namespace pypar
