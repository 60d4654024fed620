// Launches all_gather.cuh: by a kernel, or by copy engines.

#include <torch/library.h>

#include "cuda/gather.cuh"

namespace pypar {

namespace {

void all_gather(const at::Tensor& shard, at::Tensor& full, at::IntArrayRef sizes, const at::Tensor& pointers,
                int64_t rank, int64_t slot_bytes, double timeout_s, const std::optional<at::Tensor>& report) {
  const DeviceGuard guard(shard.device());
  const Gather gather = gather_from("all_gather", shard, sizes, pointers, rank, slot_bytes, timeout_s, report);
  gather_by_kernel("all_gather", gather, shard, full);
}

void all_gather_copied(const at::Tensor& shard, at::Tensor& full, at::IntArrayRef sizes, at::IntArrayRef addresses,
                       const at::Tensor& pointers, int64_t rank, int64_t slot_bytes, double timeout_s,
                       const std::optional<at::Tensor>& report) {
  constexpr const char* kOp = "all_gather_copied";
  const DeviceGuard guard(shard.device());
  const Gather gather = gather_from(kOp, shard, sizes, pointers, rank, slot_bytes, timeout_s, report);
  check_like(kOp, "full", full, shard);
  check_numel(kOp, "full", full, shard.scalar_type(), gather.cuts.begin[gather.channel.world]);
  gather_start(kOp, gather, shard, addresses);
  launch(wait_kernel, dim3(1), dim3(kMaxRanks), 0, gather.stream, gather.channel, true);
  copy_async(full.mutable_data_ptr(), first_slot(gather.channel, addresses[static_cast<size_t>(rank)]), full.nbytes(),
             gather.stream);
  launch(finish_kernel, dim3(1), dim3(1), 0, gather.stream, gather.channel, false);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(pypar_cuda, m) {
  m.def(
      "all_gather(Tensor shard, Tensor(a!) full, int[] sizes, Tensor pointers, int rank, int slot_bytes, "
      "float timeout_s, Tensor? report=None) -> ()");
  m.def(
      "all_gather_copied(Tensor shard, Tensor(a!) full, int[] sizes, int[] addresses, Tensor pointers, int rank, "
      "int slot_bytes, float timeout_s, Tensor? report=None) -> ()");
}

TORCH_LIBRARY_IMPL(pypar_cuda, CompositeExplicitAutograd, m) {
  m.impl("all_gather", all_gather);
  m.impl("all_gather_copied", all_gather_copied);
}

}  // namespace pypar
