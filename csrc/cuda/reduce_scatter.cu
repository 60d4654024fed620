// Launches reduce_scatter.cuh.

#include <torch/library.h>

#include "cuda/tensors.cuh"

namespace pypar {

namespace {

void reduce_scatter(const at::Tensor& x, at::Tensor& out, at::IntArrayRef sizes, const std::string& op,
                    const at::Tensor& pointers, int64_t rank, int64_t slot_bytes, double timeout_s,
                    const std::optional<at::Tensor>& report) {
  constexpr const char* kOp = "reduce_scatter";
  check_like(kOp, "x", x, x), check_like(kOp, "out", out, x), check_like(kOp, "pointers", pointers, x);
  const Channel channel = channel_from(kOp, pointers, rank, slot_bytes, timeout_s, report);
  const Cuts cuts = cuts_from(kOp, channel, sizes);
  check_numel(kOp, "x", x, x.scalar_type(), cuts.begin[channel.world]);
  check_numel(kOp, "out", out, x.scalar_type(), cuts.num(channel.rank));
  const ReduceScatterParams params{x.const_data_ptr(), out.mutable_data_ptr(), cuts, reduction_of(kOp, op), channel};
  const DeviceGuard guard(x.device());
  with_element(kOp, x.scalar_type(), [&](auto element) {
    using T = decltype(element);
    const int64_t bytes = pieces_bytes<T>(channel, sizes);
    check_slot(kOp, channel, bytes);
    launch(reduce_scatter_kernel<T>, dim3(blocks_for(bytes / channel.world)), dim3(kThreads), 0, current_stream(x),
           params, true);
  });
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(pypar_cuda, m) {
  m.def(
      "reduce_scatter(Tensor x, Tensor(a!) out, int[] sizes, str op, Tensor pointers, int rank, int slot_bytes, "
      "float timeout_s, Tensor? report=None) -> ()");
}

TORCH_LIBRARY_IMPL(pypar_cuda, CompositeExplicitAutograd, m) {
  m.impl("reduce_scatter", reduce_scatter);
}

}  // namespace pypar
