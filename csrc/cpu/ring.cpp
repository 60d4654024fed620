#include "cpu/ring.h"

#include "cpu/tensors.h"

namespace pypar {

RingRegion::RingRegion(const char* op, const at::Tensor& memory, int64_t num_slots) {
  check_cpu_tensor(op, "the ring", memory);
  TORCH_CHECK_VALUE(num_slots >= 1 && num_slots <= kMaxRingSlots, op, ": num_slots is ", num_slots, ", expected 1 to ",
                    kMaxRingSlots);
  const auto slots_bytes = memory.numel() - static_cast<int64_t>(sizeof(RingHead));
  const int64_t line = kCacheLineBytes;
  TORCH_CHECK_VALUE(memory.scalar_type() == at::kByte && memory.is_contiguous() &&
                        slots_bytes % (num_slots * line) == 0 && slots_bytes / num_slots >= 3 * line &&
                        reinterpret_cast<uintptr_t>(memory.const_data_ptr()) % line == 0,
                    op, ": the ring is ", memory.scalar_type(), memory.sizes(), ", expected uint8 [", sizeof(RingHead),
                    " + num_slots * (", sizeof(RingSlot), " + bytes of a slot)], aligned to ", line,
                    ", where a slot has 128 bytes or more, a multiple of ", line);
  base_ = static_cast<std::byte*>(memory.mutable_data_ptr());
  num_slots_ = static_cast<size_t>(num_slots);
  slot_bytes_ = static_cast<size_t>(slots_bytes / num_slots) - sizeof(RingSlot);
}

namespace {

// Throws PeerError where the group's ranks share no memory, ValueError for a peer that isn't another rank of it.
std::shared_ptr<Communicator> ring_communicator(const char* op, const std::string& group_name, int64_t peer) {
  auto communicator = communicator_of(group_name);
  TORCH_CHECK_VALUE(peer >= 0 && peer < communicator->world() && peer != communicator->rank(), op, ": peer ", peer,
                    " is not another rank of the group of ", communicator->world(), "; this is rank ",
                    communicator->rank());
  return communicator;
}

}  // namespace

RingEnd::RingEnd(const char* op, at::Tensor my_ring, at::Tensor their_ring, int64_t slots, int64_t peer_rank,
                 const std::string& group_name)
    : communicator(ring_communicator(op, group_name, peer_rank)),
      my_memory(std::move(my_ring)),
      their_memory(std::move(their_ring)),
      num_slots(slots),
      peer(static_cast<int>(peer_rank)),
      mine(op, my_memory, slots),
      theirs(op, their_memory, slots) {}

uint32_t next_free_piece(const Communicator& communicator, const RingRegion& mine, int peer) {
  const uint32_t piece = mine.head().sent + 1;
  // Before the first lap the target lies behind zero, where credits begin.
  wait_ring(communicator, mine.credit(piece), piece - mine.num_slots(), mine.head().senders_asleep, peer, [&] {
    return "ring_send to " + communicator.rank_text(peer) + ", piece " + std::to_string(piece) + ": all " +
           std::to_string(mine.num_slots()) + " slots hold what it has not given back";
  });
  return piece;
}

}  // namespace pypar
