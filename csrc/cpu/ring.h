// A ring of slots from one rank to another, in memory that both map: what ring_send and ring_recv share.
//
// Each of the two ranks holds a region of the same layout. The sender writes messages into the slots of the receiver's
// region, the receiver writes credits into the sender's; each polls its own region only. Slot (n - 1) % num_slots holds
// piece n; it is free again when its credit has reached n. A message that fits is one piece, and its receiver gets
// views of the slot, which is given back when the last view is gone, in whatever order; a larger one is cut into
// pieces, and copied out.
#pragma once

#include <array>
#include <memory>
#include <string>
#include <tuple>
#include <vector>

#include <ATen/ATen.h>

#include "comm/communicator.h"
#include "pypar/signal.h"

namespace pypar {

inline constexpr int kMaxRingSlots = 64;
inline constexpr int kMaxRingDims = 7;

struct RingHead {
  // At the receiver's.
  alignas(kCacheLineBytes) uint32_t received;  // pieces taken
  alignas(kCacheLineBytes) uint32_t receivers_asleep;
  // At the sender's.
  alignas(kCacheLineBytes) uint32_t sent;  // pieces published
  alignas(kCacheLineBytes) uint32_t senders_asleep;
  alignas(
      kCacheLineBytes) std::array<uint32_t, kMaxRingSlots> credits;  // by slot: the newest piece that was given back
};

struct alignas(kCacheLineBytes) RingSlot {
  uint32_t piece;  // published last
  uint32_t num_tensors;
  uint64_t total;  // bytes of the message, heads of its tensors included
  int64_t tag;
};

struct alignas(kCacheLineBytes) TensorHead {
  uint8_t type;  // at::ScalarType
  uint8_t ndim;
  std::array<int64_t, kMaxRingDims> sizes;
};

// One of the two regions.
class RingRegion {
 public:
  // Throws ValueError for memory that isn't a ring of num_slots.
  RingRegion(const char* op, const at::Tensor& memory, int64_t num_slots);

  RingHead& head() const { return *reinterpret_cast<RingHead*>(base_); }
  RingSlot& slot(uint32_t piece) const { return reinterpret_cast<RingSlot*>(base_ + sizeof(RingHead))[index(piece)]; }
  std::byte* data(uint32_t piece) const {
    return base_ + sizeof(RingHead) + num_slots_ * sizeof(RingSlot) + index(piece) * slot_bytes_;
  }
  uint32_t& credit(uint32_t piece) const { return head().credits[index(piece)]; }
  uint32_t num_slots() const { return static_cast<uint32_t>(num_slots_); }
  size_t slot_bytes() const { return slot_bytes_; }

 private:
  size_t index(uint32_t piece) const { return (piece - 1) % num_slots_; }
  std::byte* base_;
  size_t num_slots_;
  size_t slot_bytes_;
};

inline size_t padded(size_t bytes) {
  return (bytes + kCacheLineBytes - 1) / kCacheLineBytes * kCacheLineBytes;
}

// The test seam of Communicator::set_stall.
void stall_at(int rank, uint32_t round);

// Waits until `word` reached `target`; `what` says for whom and for what, where the wait ends otherwise.
template <typename Text>
void wait_ring(const Communicator& communicator, uint32_t& word, uint32_t target, uint32_t& asleep, int peer,
               Text&& what) {
  if (reached(load_acquire(word), target)) return;
  const Deadline deadline = communicator.default_deadline();
  wait_signal(word, target, asleep, communicator.spin_ns(), [&] {
    try {
      communicator.check_interrupt(what());
      communicator.check_alive(peer, what(), deadline);
    } catch (const PeerError& error) {
      if (reached(load_acquire(word), target)) return;  // it came before its sender ended
      communicator.abort(error.what());
      throw;
    } catch (const Interrupted& error) {
      communicator.abort(error.what());
      throw;
    }
  });
}

// The number of the next piece to `peer`, whose slot is free when this returns.
uint32_t next_free_piece(const Communicator& communicator, const RingRegion& mine, int peer);

// One rank's end of a ring, checked once: what the ops and Python's RingEnd work on.
struct RingEnd {
  RingEnd(const char* op, at::Tensor mine, at::Tensor theirs, int64_t num_slots, int64_t peer,
          const std::string& group_name);

  void send(at::TensorList tensors, int64_t tag) const;
  std::tuple<std::vector<at::Tensor>, int64_t> recv() const;

  const std::shared_ptr<Communicator> communicator;
  const at::Tensor my_memory, their_memory;
  const int64_t num_slots;
  const int peer;
  const RingRegion mine, theirs;
};

}  // namespace pypar
