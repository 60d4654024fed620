// Every kernel of csrc/cuda for the types that its launcher gives it, for nvcc alone: what test_cuda_static.py reads.

#include "cuda/all_gather.cuh"
#include "cuda/all_reduce_multimem.cuh"
#include "cuda/ring_recv.cuh"
#include "cuda/zero_gather.cuh"
#include "cuda/zero_scatter.cuh"
#include "cuda/zero_step.cuh"

namespace pypar {

#define PYPAR_REDUCTIONS(T)                                                                 \
  template __global__ void one_shot_all_reduce<T>(const __grid_constant__ AllReduceParams); \
  template __global__ void two_shot_all_reduce<T>(const __grid_constant__ AllReduceParams); \
  template __global__ void reduce_scatter_kernel<T>(const __grid_constant__ ReduceScatterParams);
PYPAR_REDUCTIONS(float)
PYPAR_REDUCTIONS(__nv_bfloat16)
PYPAR_REDUCTIONS(__half)
PYPAR_REDUCTIONS(double)

#define PYPAR_GRADIENTS(T)                                                                    \
  template __global__ void multimem_all_reduce<T>(const __grid_constant__ MultimemParams);    \
  template __global__ void zero_scatter_kernel<T>(const __grid_constant__ ZeroScatterParams); \
  template __global__ void zero_step_kernel<T>(const __grid_constant__ ZeroStepParams);
PYPAR_GRADIENTS(float)
PYPAR_GRADIENTS(__nv_bfloat16)
PYPAR_GRADIENTS(__half)

#define PYPAR_COPIES(T) template __global__ void all_gather_kernel<T>(const __grid_constant__ AllGatherParams);
PYPAR_COPIES(uint8_t)
PYPAR_COPIES(uint16_t)
PYPAR_COPIES(uint32_t)
PYPAR_COPIES(uint64_t)

}  // namespace pypar
