// The protocol of docs/gpu_kernels.md: where a kernel meets the same kernel of the other ranks. pypar/channel.py makes
// the memory, a test holds the layouts together.
//
// Functions of a block are called by all of its threads; what one of them waits for has arrived for all when it
// returns. A wait whose time is over ends the kernel: nobody goes on with what is not there.
#pragma once

#include <cstdint>

#include "pypar/signal.cuh"

namespace pypar {

inline constexpr int kHeaderWords = 16;
inline constexpr int kChunks = 256;  // flags for each source and parity
inline constexpr int kMaxRanks = 64;
enum Word : int { kEpoch, kDone, kAbort, kError, kErrorRank, kErrorIndex, kErrorCall, kClaimed };
enum Code : uint32_t { kNoData = 1, kNoSlot = 2, kStopped = 3 };
// In the abort word: this plus the rank that was waited for in vain. 1 says nothing more.
inline constexpr uint32_t kAbortFor = 256;

struct Channel {
  const int64_t* pointers;  // [world] on the device: every rank's channel, as this rank maps it
  int rank, world;
  int64_t slot_bytes;
  uint64_t timeout_ns;
  uint32_t* report;  // [4] pinned memory of the host or null: the error once more, since a trap ends the device's
};

__host__ __device__ inline int64_t slots_offset(int world) {
  const int64_t words = kHeaderWords + 2 * static_cast<int64_t>(world) * kChunks + 2 * world;
  return (4 * words + 255) / 256 * 256;
}

__device__ inline uint32_t* words_of(const Channel& channel, int owner) {
  return reinterpret_cast<uint32_t*>(channel.pointers[owner]);
}

// In the owner's channel: `source` has written its piece `chunk` of `call`.
__device__ inline uint32_t* full_flag(const Channel& channel, int owner, int source, int chunk, uint32_t call) {
  const int64_t row = static_cast<int64_t>(call & 1) * channel.world + source;
  return words_of(channel, owner) + kHeaderWords + row * kChunks + chunk;
}

// In the owner's channel: `consumer` has read all that the owner wrote to it for `call`.
__device__ inline uint32_t* empty_flag(const Channel& channel, int owner, int consumer, uint32_t call) {
  const int64_t full = 2 * static_cast<int64_t>(channel.world) * kChunks;
  return words_of(channel, owner) + kHeaderWords + full + (call & 1) * channel.world + consumer;
}

// The slot of `call` in the owner's channel.
template <typename T>
__device__ T* slot_of(const Channel& channel, int owner, uint32_t call) {
  const int64_t offset = slots_offset(channel.world) + (call & 1) * channel.slot_bytes;
  return reinterpret_cast<T*>(reinterpret_cast<char*>(words_of(channel, owner)) + offset);
}

// Modulo 2^32.
__device__ inline bool reached(uint32_t value, uint32_t target) {
  return static_cast<int32_t>(value - target) >= 0;
}

// The number of the call that runs now: one more than those that are over.
__device__ inline uint32_t this_call(const Channel& channel) {
  return words_of(channel, channel.rank)[kEpoch] + 1;
}

// For the first thread of this rank that ends a kernel; the others find its claim, and wait until it must have written,
// since a trap of theirs would cut it off.
__device__ inline bool claim(const Channel& channel) {
  if (set_once_gpu(words_of(channel, channel.rank) + kClaimed, 1) == 0) return true;
  for (int i = 0; i < 10000; ++i) nap();
  return false;
}

__device__ inline void write_report(const Channel& channel, uint32_t code, int rank, int index, uint32_t call) {
  if (channel.report == nullptr) return;
  channel.report[1] = static_cast<uint32_t>(rank);
  channel.report[2] = static_cast<uint32_t>(index);
  channel.report[3] = call;
  channel.report[0] = code;
  fence_sys();  // it is with the host before a store to a peer could fail
}

// Says why in this rank's channel and in the host's report, tells every peer, and ends the kernel.
__device__ inline void give_up(const Channel& channel, uint32_t code, int peer, int index, uint32_t call) {
  uint32_t* mine = words_of(channel, channel.rank);
  if (claim(channel)) {
    mine[kError] = code;
    mine[kErrorRank] = static_cast<uint32_t>(peer);
    mine[kErrorIndex] = static_cast<uint32_t>(index);
    mine[kErrorCall] = call;
    write_report(channel, code, peer, index, call);
  }
  for (int r = 0; r < channel.world; ++r) {
    store_release_sys(words_of(channel, r) + kAbort, kAbortFor + static_cast<uint32_t>(peer));
  }
  fence_sys();
  trap();
}

// How long one wait goes on; each look that finds nothing is followed by rest().
struct Patience {
  uint64_t deadline = 0;
  uint32_t looks = 0;

  __device__ void rest(const Channel& channel, uint32_t code, int peer, int index, uint32_t call) {
    nap();
    if (++looks % 16 != 0) return;  // the clock and the abort word cost more than the flag
    const uint32_t abort = load_relaxed_sys(words_of(channel, channel.rank) + kAbort);
    if (abort != 0) {
      const int culprit = abort >= kAbortFor ? static_cast<int>(abort - kAbortFor) : -1;
      if (claim(channel)) write_report(channel, kStopped, culprit, index, call);
      trap();
    }
    const uint64_t now = global_time_ns();
    if (deadline == 0) deadline = now + channel.timeout_ns;
    if (now > deadline) give_up(channel, code, peer, index, call);
  }
};

// One thread: until `flag` has reached `target`; what was stored before it was published can be read then, after a
// barrier by the whole block.
__device__ inline void wait_flag(const Channel& channel, const uint32_t* flag, uint32_t target, uint32_t code, int peer,
                                 int index, uint32_t call) {
  Patience patience;
  while (!reached(load_relaxed_sys(flag), target)) patience.rest(channel, code, peer, index, call);
  acquire(flag);
}

// A block's gate before its first write into peers' slots: every peer has read what this rank wrote for `before`, the
// call whose slot is written again.
__device__ inline void gate(const Channel& channel, uint32_t call, uint32_t before) {
  for (int peer = threadIdx.x; peer < channel.world; peer += blockDim.x) {
    wait_flag(channel, empty_flag(channel, channel.rank, peer, before), before, kNoSlot, peer, 0, call);
  }
  __syncthreads();
}

// With two slots that is the call before the last.
__device__ inline void gate(const Channel& channel, uint32_t call) {
  gate(channel, call, call - 2);
}

// Of a block: tells every peer that this rank's piece `chunk`, which its threads have stored, is there.
__device__ inline void publish(const Channel& channel, int chunk, uint32_t call) {
  __syncthreads();
  for (int peer = threadIdx.x; peer < channel.world; peer += blockDim.x) {
    if (peer != channel.rank) store_release_sys(full_flag(channel, peer, channel.rank, chunk, call), call);
  }
}

// Of a block: piece `chunk` of every other rank has arrived here; pairs with their publish().
__device__ inline void wait(const Channel& channel, int chunk, uint32_t call) {
  for (int source = threadIdx.x; source < channel.world; source += blockDim.x) {
    if (source == channel.rank) continue;
    wait_flag(channel, full_flag(channel, channel.rank, source, chunk, call), call, kNoData, source, chunk, call);
  }
  __syncthreads();
}

// Of a block of the op's last kernel, when it has read all it needs. The last one to come here tells every peer that
// its slot is empty, and ends the call. Returns true in thread 0 of that block.
__device__ inline bool finish(const Channel& channel, uint32_t call) {
  __syncthreads();
  if (threadIdx.x != 0) return false;
  uint32_t* mine = words_of(channel, channel.rank);
  if (add_acq_rel_gpu(mine + kDone, 1) + 1 != gridDim.x) return false;
  mine[kDone] = 0;
  for (int peer = 0; peer < channel.world; ++peer) {
    store_release_sys(empty_flag(channel, peer, channel.rank, call), call);
  }
  mine[kEpoch] = call;
  return true;
}

}  // namespace pypar
