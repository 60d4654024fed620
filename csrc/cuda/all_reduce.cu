// Launches the kernels of all_reduce.cuh: "one_shot" for small messages, "two_shot" for the others.

#include <torch/library.h>

#include "cuda/all_reduce.cuh"
#include "cuda/tensors.cuh"

namespace pypar {

namespace {

void all_reduce(const at::Tensor& x, at::Tensor& out, const std::string& op, const std::string& algorithm,
                const at::Tensor& pointers, int64_t rank, int64_t slot_bytes, double timeout_s,
                const std::optional<at::Tensor>& report) {
  constexpr const char* kOp = "all_reduce";
  check_like(kOp, "x", x, x), check_like(kOp, "out", out, x), check_like(kOp, "pointers", pointers, x);
  TORCH_CHECK_VALUE(out.scalar_type() == x.scalar_type() && out.numel() == x.numel(), kOp, ": out is ",
                    out.scalar_type(), out.sizes(), ", expected ", x.scalar_type(), x.sizes(), " as x");
  TORCH_CHECK_VALUE(algorithm == "one_shot" || algorithm == "two_shot", kOp, ": algorithm is '", algorithm,
                    "', expected one_shot or two_shot");
  const bool is_one_shot = algorithm == "one_shot";
  const Channel channel = channel_from(kOp, pointers, rank, slot_bytes, timeout_s, report);
  const AllReduceParams params{x.const_data_ptr(), out.mutable_data_ptr(), x.numel(), reduction_of(kOp, op), channel};
  const DeviceGuard guard(x.device());
  with_element(kOp, x.scalar_type(), [&](auto element) {
    using T = decltype(element);
    const int64_t bytes = x.numel() * static_cast<int64_t>(sizeof(T));
    const int64_t world = channel.world;
    // Pairs of 4 bytes and a number; or chunks and results, each chunk up to 15 bytes longer than its share.
    const int64_t words = (bytes + 3) / 4;
    check_slot(kOp, channel,
               is_one_shot ? world * 8 * words : 2 * world * chunk_of<T>(x.numel(), channel.world) * sizeof(T));
    // A thread takes 4 bytes of a message that is small, 16 of a chunk.
    const int blocks = is_one_shot ? blocks_for(4 * bytes) : blocks_for(bytes / world);
    launch(is_one_shot ? one_shot_all_reduce<T> : two_shot_all_reduce<T>, dim3(blocks), dim3(kThreads), 0,
           current_stream(x), params, true);
  });
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(pypar_cuda, m) {
  m.def(
      "all_reduce(Tensor x, Tensor(a!) out, str op, str algorithm, Tensor pointers, int rank, int slot_bytes, "
      "float timeout_s, Tensor? report=None) -> ()");
}

TORCH_LIBRARY_IMPL(pypar_cuda, CompositeExplicitAutograd, m) {
  m.impl("all_reduce", all_reduce);
}

}  // namespace pypar
