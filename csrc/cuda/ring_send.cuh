// One message from a rank to another, into the next slot of a ring at the receiver's.
//
// A ring is a channel of its own for two ranks; both directions may use it. Its two slots are one area, cut for
// num_slots messages. Piece n, counted from 1 by both sides, lies in slot (n - 1) % num_slots: a header of 64 bytes and
// the data. The receiver's full[0][sender][slot] becomes n when the piece is there, the sender's
// full[1][receiver][slot] when it is given back: its credit. The done and epoch words and the empty flags are not used.
#pragma once

#include "cuda/channel.cuh"
#include "pypar/launch.cuh"

namespace pypar {

inline constexpr int kHeaderDims = 7;

// Travels in front of the data, so that shapes may change from message to message.
struct alignas(16) RingHeader {
  uint8_t type;  // at::ScalarType
  uint8_t ndim;
  uint8_t unused[2];
  uint32_t piece;
  int64_t sizes[kHeaderDims];
};
static_assert(sizeof(RingHeader) == 64);

struct Ring {
  Channel channel;
  int peer;  // the other one
  uint32_t piece;
  int num_slots;

  __host__ __device__ int slot() const { return static_cast<int>((piece - 1) % static_cast<uint32_t>(num_slots)); }
  __host__ __device__ int64_t each_bytes() const { return 2 * channel.slot_bytes / num_slots / 256 * 256; }
  // Of the piece's slot in a channel.
  __host__ __device__ int64_t offset() const { return slots_offset(channel.world) + slot() * each_bytes(); }
};

struct RingSendParams {
  Ring ring;
  RingHeader header;
};

__device__ inline uint32_t* arrived_flag(const Ring& ring, int receiver, int sender) {
  return full_flag(ring.channel, receiver, sender, ring.slot(), 0);
}
__device__ inline uint32_t* credit_flag(const Ring& ring, int sender, int receiver) {
  return full_flag(ring.channel, sender, receiver, ring.slot(), 1);
}
__device__ inline RingHeader* ring_header(const Ring& ring, int owner) {
  return reinterpret_cast<RingHeader*>(reinterpret_cast<char*>(words_of(ring.channel, owner)) + ring.offset());
}

// One thread, in front of the copy of the data: the slot's last message has been given back, and the header is written.
[[maybe_unused]] static __global__ void ring_gate_kernel(const __grid_constant__ RingSendParams p) {
  const Ring& ring = p.ring;
  // In the first lap the target lies behind zero, where credits begin.
  wait_flag(ring.channel, credit_flag(ring, ring.channel.rank, ring.peer),
            ring.piece - static_cast<uint32_t>(ring.num_slots), kNoSlot, ring.peer, ring.slot(), ring.piece);
  *ring_header(ring, ring.peer) = p.header;
}

// One thread, behind the copy on its stream.
[[maybe_unused]] static __global__ void ring_publish_kernel(const __grid_constant__ RingSendParams p) {
  store_release_sys(arrived_flag(p.ring, p.ring.peer, p.ring.channel.rank), p.ring.piece);
}

// Queues one message. address: of the peer's channel, on the host.
inline void send_by_copy(const RingSendParams& params, int64_t address, const void* data, int64_t bytes,
                         cudaStream_t stream) {
  launch(ring_gate_kernel, dim3(1), dim3(1), 0, stream, params, true);
  char* slot = reinterpret_cast<char*>(address) + params.ring.offset();
  copy_async(slot + sizeof(RingHeader), data, static_cast<size_t>(bytes), stream);
  launch(ring_publish_kernel, dim3(1), dim3(1), 0, stream, params, false);
}

}  // namespace pypar
