// The host twin of csrc/include/pypar/launch.cuh. A launch returns when the kernel is over, so a stream is an order
// that the caller keeps.
#pragma once

#include <cstring>

#include <cuda_runtime.h>

namespace pypar {

template <typename T>
T* dynamic_shared() {
  return reinterpret_cast<T*>(::emulation::current().block->shared.get());
}

template <typename Params>
void launch(void (*kernel)(Params), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t /*stream*/,
            const Params& params, bool co_resident) {
  ::emulation::run({grid, block, shared_bytes}, co_resident, [=] { kernel(params); });
}

inline void copy_async(void* to, const void* from, size_t bytes, cudaStream_t /*stream*/) {
  if (bytes != 0) std::memcpy(to, from, bytes);
}

}  // namespace pypar
