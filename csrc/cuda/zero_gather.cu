// Launches what zero_gather.cuh explains.

#include <torch/library.h>

#include "cuda/gather.cuh"
#include "cuda/zero_gather.cuh"

namespace pypar {

namespace {

void zero_gather(at::Tensor& full, const at::Tensor& shard, at::IntArrayRef sizes, const at::Tensor& pointers,
                 int64_t rank, int64_t slot_bytes, double timeout_s, const std::optional<at::Tensor>& report) {
  const DeviceGuard guard(shard.device());
  const Gather gather = gather_from("zero_gather", shard, sizes, pointers, rank, slot_bytes, timeout_s, report);
  gather_by_kernel("zero_gather", gather, shard, full);
}

void zero_gather_start(const at::Tensor& shard, at::IntArrayRef sizes, at::IntArrayRef addresses,
                       const at::Tensor& pointers, int64_t rank, int64_t slot_bytes, double timeout_s,
                       const std::optional<at::Tensor>& report) {
  constexpr const char* kOp = "zero_gather_start";
  const DeviceGuard guard(shard.device());
  const Gather gather = gather_from(kOp, shard, sizes, pointers, rank, slot_bytes, timeout_s, report);
  gather_start(kOp, gather, shard, addresses);
}

void zero_gather_wait(const at::Tensor& pointers, int64_t rank, int64_t slot_bytes, double timeout_s,
                      const std::optional<at::Tensor>& report) {
  const DeviceGuard guard(pointers.device());
  const Channel channel = channel_from("zero_gather_wait", pointers, rank, slot_bytes, timeout_s, report);
  launch(wait_kernel, dim3(1), dim3(kMaxRanks), 0, current_stream(pointers), channel, true);
}

void zero_gather_free(const at::Tensor& pointers, int64_t rank, int64_t slot_bytes) {
  const DeviceGuard guard(pointers.device());
  const Channel channel = channel_from("zero_gather_free", pointers, rank, slot_bytes, 1, std::nullopt);
  launch(finish_kernel, dim3(1), dim3(1), 0, current_stream(pointers), channel, false);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(pypar_cuda, m) {
  m.def(
      "zero_gather(Tensor(a!) full, Tensor shard, int[] sizes, Tensor pointers, int rank, int slot_bytes, "
      "float timeout_s, Tensor? report=None) -> ()");
  m.def(
      "zero_gather_start(Tensor shard, int[] sizes, int[] addresses, Tensor pointers, int rank, int slot_bytes, "
      "float timeout_s, Tensor? report=None) -> ()");
  m.def("zero_gather_wait(Tensor pointers, int rank, int slot_bytes, float timeout_s, Tensor? report=None) -> ()");
  m.def("zero_gather_free(Tensor pointers, int rank, int slot_bytes) -> ()");
}

TORCH_LIBRARY_IMPL(pypar_cuda, CompositeExplicitAutograd, m) {
  m.impl("zero_gather", zero_gather);
  m.impl("zero_gather_start", zero_gather_start);
  m.impl("zero_gather_wait", zero_gather_wait);
  m.impl("zero_gather_free", zero_gather_free);
}

}  // namespace pypar
