// y = shard `rank` of x of rank 0 op x of rank 1 op ..., in rank order.
#pragma once

#include "cuda/channel.cuh"
#include "cuda/elements.cuh"

namespace pypar {

// Where the shards of all ranks begin; the end of the last one behind them.
struct Cuts {
  int64_t begin[kMaxRanks + 1];

  __host__ __device__ int64_t num(int rank) const { return begin[rank + 1] - begin[rank]; }
};

// Of the pieces in an owner's slot: its shard, up to where 16 bytes begin.
template <typename T>
__host__ __device__ inline int64_t stride_of(int64_t shard) {
  constexpr int64_t kNum = Vector<T>::kNum;
  return (shard + kNum - 1) / kNum * kNum;
}

// Of every block: its part of each owner's shard goes to the owner's slot, and it waits for the same part of its own
// shard from all. Blocks meet the same block of the other ranks only.
template <typename T>
__device__ inline void exchange_shards(const Channel& channel, const T* x, const Cuts& cuts, uint32_t call) {
  const int block = static_cast<int>(blockIdx.x), world = channel.world, rank = channel.rank;
  gate(channel, call);
  for (int i = 1; i < world; ++i) {
    const int owner = (rank + i) % world;
    const Run run = part_of<T>(cuts.num(owner), block, gridDim.x);
    T* slot = slot_of<T>(channel, owner, call) + rank * stride_of<T>(cuts.num(owner));
    copy_run(slot + run.begin, x + cuts.begin[owner] + run.begin, run.num);
  }
  publish(channel, block, call);
  wait(channel, block, call);
}

// The pieces of run `run` of this rank's shard, after exchange_shards().
template <typename T>
__device__ inline Sources<T> shard_sources(const Channel& channel, const T* x, const Cuts& cuts, Run run,
                                           uint32_t call) {
  const T* slot = slot_of<T>(channel, channel.rank, call) + run.begin;
  return {x + cuts.begin[channel.rank] + run.begin, slot, stride_of<T>(cuts.num(channel.rank)), channel.rank,
          channel.world};
}

struct ReduceScatterParams {
  const void* x;  // [cuts.begin[world]]
  void* out;      // [cuts.num(rank)]
  Cuts cuts;
  Reduction op;
  Channel channel;
};

template <typename T>
struct ToShard {
  Reduction op;
  int world;
  T* out;

  __device__ void one(int64_t i, typename Element<T>::Wide sum) { out[i] = Element<T>::narrow(scaled(op, sum, world)); }
  __device__ void vector(int64_t i, const typename Element<T>::Wide* sum) {
    Vector<T> y;
#pragma unroll
    for (int k = 0; k < Vector<T>::kNum; ++k) y.at[k] = Element<T>::narrow(scaled(op, sum[k], world));
    store_vector(out + i, y);
  }
};

template <typename T>
__global__ void reduce_scatter_kernel(const __grid_constant__ ReduceScatterParams p) {
  const uint32_t call = this_call(p.channel);
  const T* x = static_cast<const T*>(p.x);
  const Run run = part_of<T>(p.cuts.num(p.channel.rank), static_cast<int>(blockIdx.x), gridDim.x);
  T* out = static_cast<T*>(p.out) + run.begin;
  exchange_shards(p.channel, x, p.cuts, call);
  ToShard<T> sink{p.op, p.channel.world, out};
  reduce_run(shard_sources(p.channel, x, p.cuts, run, call), run.num, p.op, aligned16(out), sink);
  finish(p.channel, call);
}

}  // namespace pypar
