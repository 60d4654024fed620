// Every rank's shard to every rank. By a kernel: 16-byte stores into the peers' slots. By copy engines: the launcher's
// copies between gate_kernel and publish_kernel, which leave the SMs to the matmul beside them.
#pragma once

#include "cuda/channel.cuh"
#include "cuda/elements.cuh"
#include "cuda/reduce_scatter.cuh"
#include "pypar/launch.cuh"

namespace pypar {

struct AllGatherParams {
  const void* shard;  // [cuts.num(rank)]
  void* full;         // [cuts.begin[world]]
  Cuts cuts;
  Channel channel;
};

// In elements of T, of whatever type has as many bytes. Slot: as full.
template <typename T>
__global__ void all_gather_kernel(const __grid_constant__ AllGatherParams p) {
  const Channel& channel = p.channel;
  const int block = static_cast<int>(blockIdx.x), world = channel.world, rank = channel.rank;
  const uint32_t call = this_call(channel);
  const T* shard = static_cast<const T*>(p.shard);
  T* full = static_cast<T*>(p.full);
  const Run mine = part_of<T>(p.cuts.num(rank), block, gridDim.x);
  gate(channel, call);
  // Whoever needs this shard first, the rank below that starts with it after its own, gets it first.
  for (int i = 1; i < world; ++i) {
    T* slot = slot_of<T>(channel, (rank + world - i) % world, call) + p.cuts.begin[rank];
    copy_run(slot + mine.begin, shard + mine.begin, mine.num);
  }
  publish(channel, block, call);
  T* own = full + p.cuts.begin[rank];
  if (own != shard) copy_run(own + mine.begin, shard + mine.begin, mine.num);
  wait(channel, block, call);
  const T* slot = slot_of<T>(channel, rank, call);
  for (int i = 1; i < world; ++i) {
    const int source = (rank + i) % world;
    const Run run = part_of<T>(p.cuts.num(source), block, gridDim.x);
    copy_run(full + p.cuts.begin[source] + run.begin, slot + p.cuts.begin[source] + run.begin, run.num);
  }
  finish(channel, call);
}

// The kernels around copies by an engine. A copy's address is fixed when it is queued, and when a graph is captured,
// while the parity of a call is known on the device only: so all calls use the first slot, gated by the call before.

// One block: every peer has read the call before.
[[maybe_unused]] static __global__ void gate_kernel(const __grid_constant__ Channel channel) {
  const uint32_t call = this_call(channel);
  gate(channel, call, call - 1);
}

// One block, behind the copies on their stream, so that these are over: tells the peers.
[[maybe_unused]] static __global__ void publish_kernel(const __grid_constant__ Channel channel) {
  publish(channel, 0, this_call(channel));
}

// One block: the shards of all ranks are in this rank's first slot.
[[maybe_unused]] static __global__ void wait_kernel(const __grid_constant__ Channel channel) {
  wait(channel, 0, this_call(channel));
}

// One block, behind the last reader of the slot on its stream.
[[maybe_unused]] static __global__ void finish_kernel(const __grid_constant__ Channel channel) {
  finish(channel, this_call(channel));
}

// The address of the first slot of the channel at `address`.
inline char* first_slot(const Channel& channel, int64_t address) {
  return reinterpret_cast<char*>(address) + slots_offset(channel.world);
}

// Queues all of that up to wait_kernel: this rank's shard into every rank's first slot, its own included. addresses:
// the channel's table once more, on the host, since the host queues the copies.
inline void push_by_copies(const Channel& channel, const void* shard, int64_t begin_bytes, int64_t bytes,
                           const int64_t* addresses, cudaStream_t stream) {
  launch(gate_kernel, dim3(1), dim3(kMaxRanks), 0, stream, channel, true);
  for (int i = channel.world - 1; i >= 0; --i) {  // reverse ring order, as above
    char* slot = first_slot(channel, addresses[(channel.rank + i) % channel.world]);
    copy_async(slot + begin_bytes, shard, static_cast<size_t>(bytes), stream);
  }
  launch(publish_kernel, dim3(1), dim3(kMaxRanks), 0, stream, channel, true);
}

}  // namespace pypar
