// What the launchers of ring_send.cu and ring_recv.cu share.
#pragma once

#include "cuda/ring_send.cuh"
#include "cuda/tensors.cuh"

namespace pypar {

inline Ring ring_from(const char* op, const at::Tensor& pointers, int64_t rank, int64_t peer, int64_t piece,
                      int64_t num_slots, int64_t slot_bytes, double timeout_s,
                      const std::optional<at::Tensor>& report) {
  const Channel channel = channel_from(op, pointers, rank, slot_bytes, timeout_s, report);
  TORCH_CHECK_VALUE(peer >= 0 && peer < channel.world && peer != rank, op, ": peer is ", peer,
                    ", expected another rank of ", channel.world);
  TORCH_CHECK_VALUE(num_slots >= 1 && num_slots <= kChunks, op, ": num_slots is ", num_slots, ", expected 1 to ",
                    kChunks);
  TORCH_CHECK_VALUE(piece >= 1, op, ": piece is ", piece, ", expected 1 or more");
  const Ring ring{channel, static_cast<int>(peer), static_cast<uint32_t>(piece), static_cast<int>(num_slots)};
  TORCH_CHECK_VALUE(ring.each_bytes() >= 256, op, ": ", num_slots, " slots don't fit into twice ", slot_bytes,
                    " bytes");
  return ring;
}

}  // namespace pypar
