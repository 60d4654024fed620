// The receiver's side of ring_send.cuh.
#pragma once

#include "cuda/ring_send.cuh"

namespace pypar {

struct RingRecvParams {
  Ring ring;
  RingHeader* header;  // on the device, or pinned on the host
};

// One thread: piece `piece` has arrived, and its header is copied out. Who runs behind it on the stream may read the
// slot.
[[maybe_unused]] static __global__ void ring_wait_kernel(const __grid_constant__ RingRecvParams p) {
  const Ring& ring = p.ring;
  wait_flag(ring.channel, arrived_flag(ring, ring.channel.rank, ring.peer), ring.piece, kNoData, ring.peer, ring.slot(),
            ring.piece);
  *p.header = *ring_header(ring, ring.channel.rank);
  fence_sys();
}

// One thread, behind the slot's last reader on the stream: the slot may be written again.
[[maybe_unused]] static __global__ void ring_credit_kernel(const __grid_constant__ RingRecvParams p) {
  store_release_sys(credit_flag(p.ring, p.ring.peer, p.ring.channel.rank), p.ring.piece);
}

}  // namespace pypar
