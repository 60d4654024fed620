// What the launchers of all_gather.cu and zero_gather.cu share.
#pragma once

#include "cuda/all_gather.cuh"
#include "cuda/tensors.cuh"

namespace pypar {

// The arguments of a gather, checked once.
struct Gather {
  Channel channel;
  Cuts cuts;
  cudaStream_t stream;
  int64_t item_bytes;
};

inline Gather gather_from(const char* op, const at::Tensor& shard, at::IntArrayRef sizes, const at::Tensor& pointers,
                          int64_t rank, int64_t slot_bytes, double timeout_s, const std::optional<at::Tensor>& report) {
  check_like(op, "shard", shard, shard), check_like(op, "pointers", pointers, shard);
  const Channel channel = channel_from(op, pointers, rank, slot_bytes, timeout_s, report);
  const Cuts cuts = cuts_from(op, channel, sizes);
  const int64_t item_bytes = shard.element_size();
  check_numel(op, "shard", shard, shard.scalar_type(), cuts.num(channel.rank));
  check_slot(op, channel, cuts.begin[channel.world] * item_bytes);
  return {channel, cuts, current_stream(shard), item_bytes};
}

// Into every peer's slot and from the own slot to `full`, by one kernel.
inline void gather_by_kernel(const char* op, const Gather& gather, const at::Tensor& shard, at::Tensor& full) {
  check_like(op, "full", full, shard);
  check_numel(op, "full", full, shard.scalar_type(), gather.cuts.begin[gather.channel.world]);
  const AllGatherParams params{shard.const_data_ptr(), full.mutable_data_ptr(), gather.cuts, gather.channel};
  int64_t most = 0;
  for (int r = 0; r < gather.channel.world; ++r) most = std::max(most, gather.cuts.num(r));
  with_bytes(static_cast<size_t>(gather.item_bytes), [&](auto element) {
    launch(all_gather_kernel<decltype(element)>, dim3(blocks_for(most * gather.item_bytes)), dim3(kThreads), 0,
           gather.stream, params, true);
  });
}

// By copy engines: push_by_copies() of all_gather.cuh.
inline void gather_start(const char* op, const Gather& gather, const at::Tensor& shard, at::IntArrayRef addresses) {
  const Channel& channel = gather.channel;
  TORCH_CHECK_VALUE(static_cast<int>(addresses.size()) == channel.world, op, ": ", addresses.size(),
                    " addresses, expected ", channel.world, ", those in pointers");
  push_by_copies(channel, shard.const_data_ptr(), gather.cuts.begin[channel.rank] * gather.item_bytes,
                 static_cast<int64_t>(shard.nbytes()), addresses.data(), gather.stream);
}

}  // namespace pypar
