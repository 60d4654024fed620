// The next message of a ring, in views of its slot: see ring.h.

#include <algorithm>
#include <cstring>
#include <tuple>

#include <torch/library.h>

#include "cpu/reduce.h"
#include "cpu/ring.h"
#include "cpu/tensors.h"

namespace pypar {

namespace {

constexpr const char* kOp = "ring_recv";

// A slot that this rank has taken and will give back.
class Lease {
 public:
  Lease(const RingEnd& end, uint32_t piece)
      : mine_(end.my_memory), theirs_(end.their_memory), region_(end.theirs), piece_(piece) {}
  Lease(const Lease&) = delete;
  ~Lease() { notify(region_.credit(piece_), piece_, region_.head().senders_asleep); }

 private:
  const at::Tensor mine_, theirs_;  // the memory stays mapped
  const RingRegion region_;
  const uint32_t piece_;
};

class Reader {
 public:
  explicit Reader(const RingEnd& end) : end_(end), mine_(end.mine) {
    next();
    header_ = mine_.slot(piece_);
  }

  std::tuple<std::vector<at::Tensor>, int64_t> message() {
    std::vector<at::Tensor> tensors;
    const bool whole = header_.total <= mine_.slot_bytes();
    for (uint32_t i = 0; i < header_.num_tensors; ++i) {
      TensorHead head;
      read(&head, sizeof(head));
      const at::IntArrayRef sizes(head.sizes.data(), head.ndim);
      const auto options = at::TensorOptions().dtype(static_cast<at::ScalarType>(head.type));
      if (whole) {
        tensors.push_back(at::from_blob(at_, sizes, [lease = lease_](void*) {}, options));
        const size_t bytes = padded(tensors.back().nbytes());
        at_ += bytes, room_ -= bytes;
      } else {
        tensors.push_back(at::empty(sizes, options));
        read(tensors.back().mutable_data_ptr(), tensors.back().nbytes());
      }
    }
    return {std::move(tensors), header_.tag};
  }

 private:
  // Waits for a piece and takes it.
  void next() {
    lease_.reset();
    piece_ = mine_.head().received + 1;
    const Communicator& communicator = *end_.communicator;
    wait_ring(communicator, mine_.slot(piece_).piece, piece_, mine_.head().receivers_asleep, end_.peer, [&] {
      return std::string(kOp) + " from " + communicator.rank_text(end_.peer) + ", piece " + std::to_string(piece_);
    });
    stall_at(communicator.rank(), piece_);
    mine_.head().received = piece_;
    lease_ = std::make_shared<Lease>(end_, piece_);
    at_ = mine_.data(piece_);
    room_ = mine_.slot_bytes();
  }
  void read(void* to, size_t bytes) {
    auto* out = static_cast<std::byte*>(to);
    while (bytes != 0) {
      if (room_ == 0) next();
      const size_t now = std::min(bytes, room_);
      copy_bytes(out, at_, now);
      const size_t line = padded(now);
      out += now, bytes -= now;
      at_ += line, room_ -= line;
    }
  }

  const RingEnd& end_;
  const RingRegion& mine_;
  uint32_t piece_ = 0;
  RingSlot header_{};
  std::shared_ptr<Lease> lease_;
  std::byte* at_ = nullptr;
  size_t room_ = 0;
};

std::tuple<std::vector<at::Tensor>, int64_t> ring_recv(at::Tensor& mine, at::Tensor& theirs, int64_t num_slots,
                                                       int64_t peer, c10::string_view group_name) {
  return with_python_errors(
      [&] { return RingEnd(kOp, mine, theirs, num_slots, peer, std::string(group_name)).recv(); });
}

}  // namespace

std::tuple<std::vector<at::Tensor>, int64_t> RingEnd::recv() const {
  return Reader(*this).message();
}

TORCH_LIBRARY_IMPL(pypar, CPU, m) {
  m.impl("ring_recv", ring_recv);
}

}  // namespace pypar
