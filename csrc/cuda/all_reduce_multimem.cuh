// y = the sum or average of every rank's x, added by the NVLink switch (NVLink SHARP) instead of the ranks.
//
// The switch adds in an order that nobody documents. One rank fetches each number and gives it to all, so the bits are
// the same on all ranks, but they are not those of a sum in rank order, and nothing says that another run has them. So
// this is for those who ask for it, and never for determinism "layout". Halves are added in float32 and rounded before
// an average scales them: a sum that is too large for float16 is infinite, whatever its average.
#pragma once

#include "cuda/all_reduce.cuh"

namespace pypar {

struct MultimemParams {
  AllReduceParams all;
  int64_t multicast;  // address of the channel's memory in every rank
};

// Of chunk `owner`, the part of `block`.
template <typename T>
__device__ inline Run piece_of(int64_t numel, int owner, int world, int block, int blocks) {
  const Run whole = part_of<T>(numel, owner, world);
  const Run run = part_of<T>(whole.num, block, blocks);
  return {whole.begin + run.begin, run.num};
}

template <typename T>
__device__ inline Vector<T> sum_of_ranks(const T* multicast, Reduction op, int world) {
  const uint4 raw = multimem_add(multicast);
  Vector<T> y;
  memcpy(static_cast<void*>(y.at), &raw, 16);
#pragma unroll
  for (int k = 0; k < Vector<T>::kNum; ++k) y.at[k] = Element<T>::narrow(scaled(op, Element<T>::widen(y.at[k]), world));
  return y;
}

template <typename T>
__device__ inline void store_to_ranks(T* multicast, const Vector<T>& y) {
  uint4 raw;
  memcpy(&raw, static_cast<const void*>(y.at), 16);
  multimem_store(multicast, raw);
}

// Every rank puts its x into its own slot; rank o fetches the sums of chunk o, and stores them to all ranks where the
// numbers were: nobody else reads those. Block b does part b of every chunk and waits for blocks b only. Pieces: b for
// numbers, kChunks / 2 + b for sums. Slot: x as it is, up to 16 bytes; what lies behind its end is added, but not read.
// The fences of publish() and wait() are also between this rank's own numbers and the switch's look at them.
template <typename T>
__global__ void multimem_all_reduce(const __grid_constant__ MultimemParams p) {
  constexpr int kNum = Vector<T>::kNum;
  const Channel& channel = p.all.channel;
  const int world = channel.world, rank = channel.rank;
  const uint32_t call = this_call(channel);
  const T* x = static_cast<const T*>(p.all.x);
  T* out = static_cast<T*>(p.all.out);
  const int block = static_cast<int>(blockIdx.x), blocks = static_cast<int>(gridDim.x);
  const int results = kChunks / 2 + block;
  T* slot = slot_of<T>(channel, rank, call);
  gate(channel, call);
  for (int owner = 0; owner < world; ++owner) {
    const Run run = piece_of<T>(p.all.numel, owner, world, block, blocks);
    copy_run(slot + run.begin, x + run.begin, run.num);
  }
  publish(channel, block, call);
  wait(channel, block, call);
  const Run run = piece_of<T>(p.all.numel, rank, world, block, blocks);
  const int64_t slot_at = reinterpret_cast<char*>(slot) - reinterpret_cast<char*>(words_of(channel, rank));
  T* sums = reinterpret_cast<T*>(p.multicast + slot_at) + run.begin;
  T* own = out + run.begin;
  for (int64_t i = threadIdx.x * kNum; i < run.num; i += blockDim.x * kNum) {
    const Vector<T> y = sum_of_ranks(sums + i, p.all.op, world);
    store_to_ranks(sums + i, y);
    if (aligned16(own) && i + kNum <= run.num) {
      store_vector(own + i, y);
    } else {
      for (int k = 0; k < kNum && i + k < run.num; ++k) own[i + k] = y.at[k];
    }
  }
  publish(channel, results, call);
  wait(channel, results, call);
  for (int i = 1; i < world; ++i) {
    const Run theirs = piece_of<T>(p.all.numel, (rank + i) % world, world, block, blocks);
    copy_run(out + theirs.begin, slot + theirs.begin, theirs.num);
  }
  finish(channel, call);
}

}  // namespace pypar
