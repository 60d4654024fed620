// A CUDA kernel as a host function: what csrc/cuda needs of CUDA's own header, executed by executor.h. First on the
// include path of the tests, in place of the toolkit's.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "executor.h"

#define __global__
#define __device__
#define __host__
#define __grid_constant__
#define __forceinline__ inline

#define threadIdx (::emulation::current().thread)
#define blockIdx (::emulation::current().block->index)
#define blockDim (::emulation::current().block->launch->block_dim)
#define gridDim (::emulation::current().block->launch->grid_dim)

struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
using dim3 = ::emulation::Dim3;
using cudaStream_t = void*;

// A store with the usual policy of the caches.
inline void __stwb(uint4* to, uint4 x) {
  *to = x;
}

inline void __syncthreads() {
  ::emulation::sync_block();
}

// Products and sums that no compiler may contract; the tests are compiled with -ffp-contract=off.
inline float __fmul_rn(float a, float b) {
  return a * b;
}
inline float __fadd_rn(float a, float b) {
  return a + b;
}
inline float __fsub_rn(float a, float b) {
  return a - b;
}
inline float __fdiv_rn(float a, float b) {
  return a / b;
}
inline float __fsqrt_rn(float a) {
  return std::sqrt(a);
}
inline double __dmul_rn(double a, double b) {
  return a * b;
}
inline double __dadd_rn(double a, double b) {
  return a + b;
}
