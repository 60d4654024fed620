// Launches ring_recv.cuh: a wait in front of the slot's readers, and the credit behind them.

#include <torch/library.h>

#include "cuda/ring.cuh"
#include "cuda/ring_recv.cuh"

namespace pypar {

namespace {

// header: uint8 [64] on the device or, to be read after the stream has been synchronized, pinned on the host. Returns
// the offset of the data in this rank's channel: memory[offset:] is valid until ring_credit.
int64_t ring_recv(at::Tensor& header, int64_t piece, int64_t num_slots, int64_t peer, const at::Tensor& pointers,
                  int64_t rank, int64_t slot_bytes, double timeout_s, const std::optional<at::Tensor>& report) {
  constexpr const char* kOp = "ring_recv";
  const Ring ring = ring_from(kOp, pointers, rank, peer, piece, num_slots, slot_bytes, timeout_s, report);
  check_numel(kOp, "header", header, at::kByte, sizeof(RingHeader));
  TORCH_CHECK_VALUE(reinterpret_cast<uintptr_t>(header.const_data_ptr()) % 16 == 0, kOp,
                    ": header isn't aligned to 16 bytes");
  const DeviceGuard guard(pointers.device());
  const RingRecvParams params{ring, static_cast<RingHeader*>(header.mutable_data_ptr())};
  launch(ring_wait_kernel, dim3(1), dim3(1), 0, current_stream(pointers), params, true);
  return ring.offset() + static_cast<int64_t>(sizeof(RingHeader));
}

void ring_credit(int64_t piece, int64_t num_slots, int64_t peer, const at::Tensor& pointers, int64_t rank,
                 int64_t slot_bytes) {
  const Ring ring = ring_from("ring_credit", pointers, rank, peer, piece, num_slots, slot_bytes, 1, std::nullopt);
  const DeviceGuard guard(pointers.device());
  launch(ring_credit_kernel, dim3(1), dim3(1), 0, current_stream(pointers), RingRecvParams{ring, nullptr}, false);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(pypar_cuda, m) {
  m.def(
      "ring_recv(Tensor(a!) header, int piece, int num_slots, int peer, Tensor pointers, int rank, int slot_bytes, "
      "float timeout_s, Tensor? report=None) -> int");
  m.def("ring_credit(int piece, int num_slots, int peer, Tensor pointers, int rank, int slot_bytes) -> ()");
}

TORCH_LIBRARY_IMPL(pypar_cuda, CompositeExplicitAutograd, m) {
  m.impl("ring_recv", ring_recv);
  m.impl("ring_credit", ring_credit);
}

}  // namespace pypar
