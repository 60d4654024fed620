// y = x of rank 0 op x of rank 1 op ..., on every rank, in rank order.
#pragma once

#include "cuda/channel.cuh"
#include "cuda/elements.cuh"

namespace pypar {

struct AllReduceParams {
  const void* x;
  void* out;  // may be x
  int64_t numel;
  Reduction op;
  Channel channel;
};

// 4 bytes travel with the number of their call in one access of 8: no flag, no fence, half the bandwidth. What makes a
// small message fast, as in NCCL's LL protocol. Slot: [source][words] pairs. What lies there of earlier calls has other
// numbers, unless nothing was written to the place for 2^32 calls.
template <typename T>
struct Words {
  static constexpr int kElements = sizeof(T) < 4 ? 4 / sizeof(T) : 1;  // that one thread takes
  static constexpr int kWords = sizeof(T) < 4 ? 1 : sizeof(T) / 4;
  uint32_t at[kWords];
};

template <typename T>
__device__ inline Words<T> load_words(const T* x, int64_t i, int64_t numel) {
  T elements[Words<T>::kElements];
#pragma unroll
  for (int k = 0; k < Words<T>::kElements; ++k) elements[k] = x[i + k < numel ? i + k : numel - 1];
  Words<T> words;
  memcpy(words.at, static_cast<const void*>(elements), sizeof(words));
  return words;
}

template <typename T>
__device__ inline void one_shot_push(uint64_t* to, const Words<T>& words, uint32_t call) {
#pragma unroll
  for (int w = 0; w < Words<T>::kWords; ++w) store_pair_sys(to + w, words.at[w], call);
}

template <typename T>
__device__ inline Words<T> one_shot_wait(const Channel& channel, const uint64_t* from, int source, uint32_t call) {
  Words<T> words;
#pragma unroll
  for (int w = 0; w < Words<T>::kWords; ++w) {
    Patience patience;
    uint64_t pair = load_pair_sys(from + w);
    while (static_cast<uint32_t>(pair >> 32) != call) {
      patience.rest(channel, kNoData, source, 0, call);
      pair = load_pair_sys(from + w);
    }
    words.at[w] = static_cast<uint32_t>(pair);
  }
  return words;
}

// Items of 4 bytes, or of 8 where an element has 8.
template <typename T>
__global__ void one_shot_all_reduce(const __grid_constant__ AllReduceParams p) {
  using E = Element<T>;
  constexpr int kElements = Words<T>::kElements, kWords = Words<T>::kWords;
  const Channel& channel = p.channel;
  const int world = channel.world, rank = channel.rank;
  const uint32_t call = this_call(channel);
  const T* x = static_cast<const T*>(p.x);
  T* out = static_cast<T*>(p.out);
  const int64_t items = (p.numel + kElements - 1) / kElements;
  const int64_t first = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x;
  const int64_t step = gridDim.x * static_cast<int64_t>(blockDim.x);
  gate(channel, call);
  for (int64_t item = first; item < items; item += step) {
    const Words<T> words = load_words(x, item * kElements, p.numel);
    for (int i = 1; i < world; ++i) {
      const int peer = (rank + i) % world;
      uint64_t* slot = slot_of<uint64_t>(channel, peer, call);
      one_shot_push<T>(slot + (rank * items + item) * kWords, words, call);
    }
  }
  const uint64_t* slot = slot_of<uint64_t>(channel, rank, call);
  for (int64_t item = first; item < items; item += step) {
    typename E::Wide sum[kElements] = {};
    for (int source = 0; source < world; ++source) {
      const Words<T> words = source == rank
                                 ? load_words(x, item * kElements, p.numel)
                                 : one_shot_wait<T>(channel, slot + (source * items + item) * kWords, source, call);
      T elements[kElements];
      memcpy(static_cast<void*>(elements), words.at, sizeof(words));
#pragma unroll
      for (int k = 0; k < kElements; ++k) {
        const auto wide = E::widen(elements[k]);
        sum[k] = source == 0 ? wide : combine(p.op, sum[k], wide);
      }
    }
#pragma unroll
    for (int k = 0; k < kElements; ++k) {
      const int64_t i = item * kElements + k;
      if (i < p.numel) out[i] = E::narrow(scaled(p.op, sum[k], world));
    }
  }
  finish(channel, call);
}

// Chunk `rank` of the result, to this rank's out and to every peer's slot.
template <typename T>
struct ToEveryRank {
  const Channel& channel;
  Reduction op;
  uint32_t call;
  int64_t at;  // of the run in a slot
  T* out;

  __device__ void one(int64_t i, typename Element<T>::Wide sum) {
    const T y = Element<T>::narrow(scaled(op, sum, channel.world));
    for (int k = 1; k < channel.world; ++k) {
      slot_of<T>(channel, (channel.rank + k) % channel.world, call)[at + i] = y;
    }
    out[i] = y;
  }
  __device__ void vector(int64_t i, const typename Element<T>::Wide* sum) {
    Vector<T> y;
#pragma unroll
    for (int k = 0; k < Vector<T>::kNum; ++k) y.at[k] = Element<T>::narrow(scaled(op, sum[k], channel.world));
    for (int k = 1; k < channel.world; ++k) {
      store_vector(slot_of<T>(channel, (channel.rank + k) % channel.world, call) + at + i, y);
    }
    store_vector(out + i, y);
  }
};

// Elements of a rank's chunk: 16 bytes begin each.
template <typename T>
__host__ __device__ inline int64_t chunk_of(int64_t numel, int world) {
  return part_of<T>(numel, 0, world).num;
}

// Chunk o goes to rank o, which reduces it and gives the result to all. Block b does part b of every chunk and waits
// for blocks b only. Pieces: b for chunks, kChunks / 2 + b for results; slot: [source][chunk], then [owner][chunk].
template <typename T>
__global__ void two_shot_all_reduce(const __grid_constant__ AllReduceParams p) {
  const Channel& channel = p.channel;
  const int world = channel.world, rank = channel.rank;
  const uint32_t call = this_call(channel);
  const T* x = static_cast<const T*>(p.x);
  T* out = static_cast<T*>(p.out);
  const int64_t chunk = chunk_of<T>(p.numel, world);
  const int block = static_cast<int>(blockIdx.x), results = kChunks / 2 + block;
  gate(channel, call);
  for (int i = 1; i < world; ++i) {
    const int owner = (rank + i) % world;
    const Run whole = part_of<T>(p.numel, owner, world);
    const Run run = part_of<T>(whole.num, block, gridDim.x);
    T* slot = slot_of<T>(channel, owner, call);
    copy_run(slot + rank * chunk + run.begin, x + whole.begin + run.begin, run.num);
  }
  publish(channel, block, call);
  wait(channel, block, call);
  const Run whole = part_of<T>(p.numel, rank, world);
  const Run run = part_of<T>(whole.num, block, gridDim.x);
  const int64_t begin = whole.begin + run.begin;
  T* slot = slot_of<T>(channel, rank, call);
  const int64_t results_at = (world + rank) * chunk + run.begin;
  ToEveryRank<T> sink{channel, p.op, call, results_at, out + begin};
  reduce_run(Sources<T>{x + begin, slot + run.begin, chunk, rank, world}, run.num, p.op, aligned16(out + begin), sink);
  publish(channel, results, call);
  wait(channel, results, call);
  for (int i = 1; i < world; ++i) {
    const int owner = (rank + i) % world;
    const Run of_owner = part_of<T>(p.numel, owner, world);
    const Run mine = part_of<T>(of_owner.num, block, gridDim.x);
    copy_run(out + of_owner.begin + mine.begin, slot + (world + owner) * chunk + mine.begin, mine.num);
  }
  finish(channel, call);
}

}  // namespace pypar
