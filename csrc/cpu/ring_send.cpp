// Tensors into the next slots of a ring: see ring.h.

#include <algorithm>
#include <cstring>

#include <torch/library.h>

#include "cpu/reduce.h"
#include "cpu/ring.h"
#include "cpu/tensors.h"

namespace pypar {

namespace {

constexpr const char* kOp = "ring_send";

// Writes a message piece by piece, each into a slot that is free.
class Writer {
 public:
  Writer(const Communicator& communicator, const RingRegion& mine, const RingRegion& theirs, int peer, RingSlot header)
      : communicator_(communicator), mine_(mine), theirs_(theirs), peer_(peer), header_(header) {}

  void write(const void* data, size_t bytes) {
    const auto* from = static_cast<const std::byte*>(data);
    while (bytes != 0) {
      if (at_ == nullptr) begin();
      const size_t now = std::min(bytes, room_);
      if (at_ != from) copy_to_peer(at_, from, now);  // equal: it was made in the slot
      from += now, bytes -= now;
      at_ += now, room_ -= now;
      skip_line();
    }
  }
  void publish() {
    if (at_ == nullptr && begun_) return;
    if (at_ == nullptr) begin();  // a message without tensors
    RingSlot& slot = theirs_.slot(piece_);
    slot.num_tensors = header_.num_tensors, slot.total = header_.total, slot.tag = header_.tag;
    stall_at(communicator_.rank(), piece_);
    mine_.head().sent = piece_;
    notify(slot.piece, piece_, theirs_.head().receivers_asleep);
    at_ = nullptr;
  }

 private:
  void begin() {
    piece_ = next_free_piece(communicator_, mine_, peer_);
    at_ = theirs_.data(piece_);
    room_ = theirs_.slot_bytes();
    begun_ = true;
  }
  // The next tensor begins on a line; a full slot goes on its way.
  void skip_line() {
    const size_t gap = (kCacheLineBytes - reinterpret_cast<uintptr_t>(at_) % kCacheLineBytes) % kCacheLineBytes;
    at_ += gap, room_ -= gap;
    if (room_ == 0) publish();
  }

  const Communicator& communicator_;
  const RingRegion &mine_, &theirs_;
  const int peer_;
  const RingSlot header_;
  uint32_t piece_ = 0;
  std::byte* at_ = nullptr;
  size_t room_ = 0;
  bool begun_ = false;
};

void ring_send(at::TensorList tensors, at::Tensor& mine, at::Tensor& theirs, int64_t num_slots, int64_t tag,
               int64_t peer, c10::string_view group_name) {
  with_python_errors([&] { RingEnd(kOp, mine, theirs, num_slots, peer, std::string(group_name)).send(tensors, tag); });
}

// Where a tensor of `bytes` will lie as the first of the next message; waits until that slot is free.
at::Tensor ring_slot(at::IntArrayRef sizes, at::ScalarType type, at::Tensor& mine, at::Tensor& theirs,
                     int64_t num_slots, int64_t peer, c10::string_view group_name) {
  return with_python_errors([&] {
    const RingEnd end("ring_slot", mine, theirs, num_slots, peer, std::string(group_name));
    const auto options = at::TensorOptions().dtype(type);
    const int64_t bytes = c10::multiply_integers(sizes) * static_cast<int64_t>(c10::elementSize(type));
    if (sizeof(TensorHead) + padded(static_cast<size_t>(bytes)) > end.theirs.slot_bytes()) {
      return at::empty(sizes, options);
    }
    const uint32_t piece = next_free_piece(*end.communicator, end.mine, end.peer);
    return at::from_blob(end.theirs.data(piece) + sizeof(TensorHead), sizes, [theirs](void*) {}, options);
  });
}

}  // namespace

void RingEnd::send(at::TensorList tensors, int64_t tag) const {
  std::vector<at::Tensor> dense;
  dense.reserve(tensors.size());
  RingSlot header{};
  header.num_tensors = static_cast<uint32_t>(tensors.size());
  header.tag = tag;
  for (const at::Tensor& x : tensors) {
    check_cpu_tensor(kOp, "a tensor", x);
    TORCH_CHECK_VALUE(x.dim() <= kMaxRingDims, kOp, ": a tensor of shape ", x.sizes(), " has more than ", kMaxRingDims,
                      " dims; flatten it");
    dense.push_back(x.contiguous());
    header.total += sizeof(TensorHead) + padded(dense.back().nbytes());
  }
  Writer writer(*communicator, mine, theirs, peer, header);
  for (const at::Tensor& x : dense) {
    TensorHead head{};
    head.type = static_cast<uint8_t>(x.scalar_type());
    head.ndim = static_cast<uint8_t>(x.dim());
    std::copy(x.sizes().begin(), x.sizes().end(), head.sizes.begin());
    writer.write(&head, sizeof(head));
    writer.write(x.const_data_ptr(), x.nbytes());
  }
  writer.publish();
}

TORCH_LIBRARY_IMPL(pypar, CPU, m) {
  m.impl("ring_send", ring_send);
  m.impl("ring_slot", ring_slot);
}

}  // namespace pypar
