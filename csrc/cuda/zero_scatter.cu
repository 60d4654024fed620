// Launches zero_scatter.cuh.

#include <ATen/Functions.h>
#include <torch/library.h>

#include "cuda/tensors.cuh"
#include "cuda/zero_scatter.cuh"

namespace pypar {

namespace {

// Returns the sum of the squares of the shard, float64 [], on its device.
at::Tensor zero_scatter(at::Tensor& shard, const at::Tensor& full, at::IntArrayRef sizes, double scale, bool accumulate,
                        const at::Tensor& pointers, int64_t rank, int64_t slot_bytes, double timeout_s,
                        const std::optional<at::Tensor>& report) {
  constexpr const char* kOp = "zero_scatter";
  check_like(kOp, "full", full, full), check_like(kOp, "shard", shard, full);
  check_like(kOp, "pointers", pointers, full);
  const Channel channel = channel_from(kOp, pointers, rank, slot_bytes, timeout_s, report);
  const Cuts cuts = cuts_from(kOp, channel, sizes);
  check_numel(kOp, "full", full, full.scalar_type(), cuts.begin[channel.world]);
  check_numel(kOp, "shard", shard, at::kFloat, cuts.num(channel.rank));
  const DeviceGuard guard(full.device());
  at::Tensor squares = at::empty({}, full.options().dtype(at::kDouble));
  with_gradient(kOp, full.scalar_type(), [&](auto element) {
    using T = decltype(element);
    const int64_t bytes = pieces_bytes<T>(channel, sizes);
    check_slot(kOp, channel, bytes);
    const int blocks = blocks_for(bytes / channel.world);
    const at::Tensor partial = at::empty({blocks}, squares.options());
    const ZeroScatterParams params{full.const_data_ptr(),
                                   shard.mutable_data_ptr<float>(),
                                   partial.mutable_data_ptr<double>(),
                                   squares.mutable_data_ptr<double>(),
                                   cuts,
                                   static_cast<float>(scale),
                                   accumulate,
                                   channel};
    launch(zero_scatter_kernel<T>, dim3(blocks), dim3(kThreads), kThreads * sizeof(double), current_stream(full),
           params, true);
  });
  return squares;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(pypar_cuda, m) {
  m.def(
      "zero_scatter(Tensor(a!) shard, Tensor full, int[] sizes, float scale, bool accumulate, Tensor pointers, "
      "int rank, int slot_bytes, float timeout_s, Tensor? report=None) -> Tensor");
}

TORCH_LIBRARY_IMPL(pypar_cuda, CompositeExplicitAutograd, m) {
  m.impl("zero_scatter", zero_scatter);
}

}  // namespace pypar
