// Launches ring_send.cuh: the data goes by a copy engine, no SM is used for it.

#include <torch/library.h>

#include "cuda/ring.cuh"

namespace pypar {

namespace {

// piece: 1 for the first message to this peer, then 2, ...; the caller counts. address: the peer's entry in pointers.
void ring_send(const at::Tensor& x, int64_t piece, int64_t num_slots, int64_t address, int64_t peer,
               const at::Tensor& pointers, int64_t rank, int64_t slot_bytes, double timeout_s,
               const std::optional<at::Tensor>& report) {
  constexpr const char* kOp = "ring_send";
  check_like(kOp, "x", x, x), check_like(kOp, "pointers", pointers, x);
  const Ring ring = ring_from(kOp, pointers, rank, peer, piece, num_slots, slot_bytes, timeout_s, report);
  const int64_t header_bytes = sizeof(RingHeader), bytes = static_cast<int64_t>(x.nbytes());
  TORCH_CHECK_VALUE(header_bytes + bytes <= ring.each_bytes(), kOp, ": x has ", bytes, " bytes, a slot holds ",
                    ring.each_bytes() - header_bytes);
  TORCH_CHECK_VALUE(x.dim() <= kHeaderDims, kOp, ": x has ", x.dim(), " dims, expected at most ", kHeaderDims);
  RingSendParams params{ring, {}};
  params.header.type = static_cast<uint8_t>(x.scalar_type());
  params.header.ndim = static_cast<uint8_t>(x.dim());
  params.header.piece = ring.piece;
  std::copy(x.sizes().begin(), x.sizes().end(), params.header.sizes);
  const DeviceGuard guard(x.device());
  send_by_copy(params, address, x.const_data_ptr(), bytes, current_stream(x));
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(pypar_cuda, m) {
  m.def(
      "ring_send(Tensor x, int piece, int num_slots, int address, int peer, Tensor pointers, int rank, int slot_bytes, "
      "float timeout_s, Tensor? report=None) -> ()");
}

TORCH_LIBRARY_IMPL(pypar_cuda, CompositeExplicitAutograd, m) {
  m.impl("ring_send", ring_send);
}

}  // namespace pypar
