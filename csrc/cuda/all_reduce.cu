// Launches the kernels of all_reduce.cuh: "one_shot" for small messages, "two_shot" for the others; and, for those who
// ask for it, "multimem" of all_reduce_multimem.cuh.

#include <torch/library.h>

#include "cuda/all_reduce_multimem.cuh"
#include "cuda/tensors.cuh"

namespace pypar {

namespace {

void multimem(const at::Tensor& x, const std::string& op, const AllReduceParams& params, int64_t multicast) {
  constexpr const char* kOp = "all_reduce";
  TORCH_CHECK_VALUE(params.op == Reduction::sum || params.op == Reduction::avg, kOp, ": op is '", op,
                    "', expected sum or avg for algorithm multimem");
  const DeviceGuard guard(x.device());
  with_gradient(kOp, x.scalar_type(), [&](auto element) {
    using T = decltype(element);
    const int64_t bytes = x.numel() * static_cast<int64_t>(sizeof(T));
    check_slot(kOp, params.channel, (bytes + 15) / 16 * 16);
    launch(multimem_all_reduce<T>, dim3(blocks_for(bytes / params.channel.world)), dim3(kThreads), 0, current_stream(x),
           MultimemParams{params, multicast}, true);
  });
}

void all_reduce(const at::Tensor& x, at::Tensor& out, const std::string& op, const std::string& algorithm,
                const at::Tensor& pointers, int64_t rank, int64_t slot_bytes, double timeout_s,
                const std::optional<at::Tensor>& report, int64_t multicast) {
  constexpr const char* kOp = "all_reduce";
  check_like(kOp, "x", x, x), check_like(kOp, "out", out, x), check_like(kOp, "pointers", pointers, x);
  TORCH_CHECK_VALUE(out.scalar_type() == x.scalar_type() && out.numel() == x.numel(), kOp, ": out is ",
                    out.scalar_type(), out.sizes(), ", expected ", x.scalar_type(), x.sizes(), " as x");
  const bool is_multimem = algorithm == "multimem";
  TORCH_CHECK_VALUE(is_multimem || algorithm == "one_shot" || algorithm == "two_shot", kOp, ": algorithm is '",
                    algorithm, "', expected one_shot, two_shot or multimem");
  TORCH_CHECK_VALUE(!is_multimem || (multicast > 0 && multicast % 256 == 0), kOp, ": multicast is ", multicast,
                    ", but algorithm multimem needs the multicast address of the channel's memory, ",
                    "pypar.channel.Channel.multicast; where that is 0, no NVLink switch adds: use two_shot");
  const bool is_one_shot = algorithm == "one_shot";
  const Channel channel = channel_from(kOp, pointers, rank, slot_bytes, timeout_s, report);
  const AllReduceParams params{x.const_data_ptr(), out.mutable_data_ptr(), x.numel(), reduction_of(kOp, op), channel};
  // One rank has nobody to add to; two_shot copies, and needs no slot for it.
  if (is_multimem && channel.world > 1) return multimem(x, op, params, multicast);
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
      "float timeout_s, Tensor? report=None, int multicast=0) -> ()");
}

TORCH_LIBRARY_IMPL(pypar_cuda, CompositeExplicitAutograd, m) {
  m.impl("all_reduce", all_reduce);
}

}  // namespace pypar
