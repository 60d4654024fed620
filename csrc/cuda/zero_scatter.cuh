// Full gradients to a shard of their mean: summed in float32 in rank order, scaled, and measured on the way.
#pragma once

#include "cuda/channel.cuh"
#include "cuda/elements.cuh"
#include "cuda/reduce_scatter.cuh"
#include "pypar/launch.cuh"

namespace pypar {

struct ZeroScatterParams {
  const void* full;  // [cuts.begin[world]]
  float* shard;      // [cuts.num(rank)]
  double* partial;   // [blocks]: the sums of squares
  double* squares;   // [1]
  Cuts cuts;
  float scale;
  bool accumulate;
  Channel channel;
};

// No contraction of a product and a sum: the bits of the CPU.
__device__ inline float scaled_shard(float sum, float scale, bool accumulate, float before) {
  const float x = __fmul_rn(sum, scale);
  return accumulate ? __fadd_rn(x, before) : x;
}

template <typename T>
struct ToScaledShard {
  float* shard;
  float scale;
  bool accumulate;
  double squares = 0;

  __device__ void one(int64_t i, float sum) {
    const float x = scaled_shard(sum, scale, accumulate, accumulate ? shard[i] : 0);
    shard[i] = x;
    squares += static_cast<double>(x) * static_cast<double>(x);
  }
  __device__ void vector(int64_t i, const float* sum) {
    constexpr int kNum = Vector<T>::kNum;
#pragma unroll
    for (int k = 0; k < kNum; k += 4) {
      Vector<float> y{};
      if (accumulate) y = load_vector(shard + i + k);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        y.at[j] = scaled_shard(sum[k + j], scale, accumulate, y.at[j]);
        squares += static_cast<double>(y.at[j]) * static_cast<double>(y.at[j]);
      }
      store_vector(shard + i + k, y);
    }
  }
};

// Of a block: the sum of every thread's x, in an order that depends on the block's size only; for thread 0.
__device__ inline double sum_of_block(double x) {
  double* sums = dynamic_shared<double>();
  sums[threadIdx.x] = x;
  for (unsigned width = blockDim.x / 2; width != 0; width /= 2) {
    __syncthreads();
    if (threadIdx.x < width) sums[threadIdx.x] += sums[threadIdx.x + width];
  }
  return threadIdx.x == 0 ? sums[0] : 0;
}

// blockDim.x is a power of 2, with one double of dynamic shared memory a thread.
template <typename T>
__global__ void zero_scatter_kernel(const __grid_constant__ ZeroScatterParams p) {
  const uint32_t call = this_call(p.channel);
  const T* full = static_cast<const T*>(p.full);
  const Run run = part_of<T>(p.cuts.num(p.channel.rank), static_cast<int>(blockIdx.x), gridDim.x);
  float* shard = p.shard + run.begin;
  exchange_shards(p.channel, full, p.cuts, call);
  ToScaledShard<T> sink{shard, p.scale, p.accumulate};
  reduce_run(shard_sources(p.channel, full, p.cuts, run, call), run.num, Reduction::sum, aligned16(shard), sink);
  const double squares = sum_of_block(sink.squares);
  if (threadIdx.x == 0) p.partial[blockIdx.x] = squares;
  if (!finish(p.channel, call)) return;
  double sum = 0;
  for (unsigned b = 0; b < gridDim.x; ++b) sum += p.partial[b];
  *p.squares = sum;
}

}  // namespace pypar
