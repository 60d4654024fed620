// Launches zero_step.cuh.

#include <cmath>

#include <torch/library.h>

#include "cuda/tensors.cuh"
#include "cuda/zero_step.cuh"

namespace pypar {

namespace {

constexpr const char* kOp = "zero_step";

float* floats(const char* name, const at::Tensor& x, const at::Tensor& like, int64_t numel) {
  check_like(kOp, name, x, like);
  check_numel(kOp, name, x, at::kFloat, numel);
  return x.mutable_data_ptr<float>();
}

// As csrc/cpu/zero_step.cpp: differences and powers in float64.
AdamWFactors factors_of(int64_t step, double lr, double beta1, double beta2, double eps, double weight_decay,
                        double grad_scale, bool is_decoupled, bool maximize) {
  TORCH_CHECK_VALUE(step >= 1, kOp, ": step is ", step, ", expected 1 or more");
  const double correction1 = 1 - std::pow(beta1, static_cast<double>(step));
  const double correction2 = 1 - std::pow(beta2, static_cast<double>(step));
  return {static_cast<float>(1 - lr * weight_decay),
          static_cast<float>(weight_decay),
          static_cast<float>(beta2),
          static_cast<float>(eps),
          static_cast<float>(1 - beta1),
          static_cast<float>(1 - beta2),
          static_cast<float>(lr / correction1),
          static_cast<float>(std::sqrt(correction2)),
          static_cast<float>(grad_scale),
          is_decoupled,
          maximize};
}

void zero_step(at::Tensor& param, const at::Tensor& grad, at::Tensor& exp_avg, at::Tensor& exp_avg_sq,
               const std::optional<at::Tensor>& max_exp_avg_sq, const std::optional<at::Tensor>& low,
               const std::optional<at::Tensor>& clip, at::IntArrayRef sizes, int64_t step, double lr, double beta1,
               double beta2, double eps, double weight_decay, double grad_scale, bool decoupled, bool maximize,
               const at::Tensor& pointers, int64_t rank, int64_t slot_bytes, double timeout_s,
               const std::optional<at::Tensor>& report) {
  check_like(kOp, "grad", grad, grad), check_like(kOp, "pointers", pointers, grad);
  const Channel channel = channel_from(kOp, pointers, rank, slot_bytes, timeout_s, report);
  const Cuts cuts = cuts_from(kOp, channel, sizes);
  check_numel(kOp, "grad", grad, grad.scalar_type(), cuts.begin[channel.world]);
  const int64_t n = cuts.num(channel.rank);
  void* low_data = nullptr;
  if (low.has_value()) {
    check_like(kOp, "low", *low, grad), check_numel(kOp, "low", *low, grad.scalar_type(), n);
    low_data = low->mutable_data_ptr();
  }
  const ZeroStepParams params{floats("param", param, grad, n),
                              floats("exp_avg", exp_avg, grad, n),
                              floats("exp_avg_sq", exp_avg_sq, grad, n),
                              max_exp_avg_sq.has_value() ? floats("max_exp_avg_sq", *max_exp_avg_sq, grad, n) : nullptr,
                              grad.const_data_ptr(),
                              low_data,
                              clip.has_value() ? floats("clip", *clip, grad, 1) : nullptr,
                              cuts,
                              factors_of(step, lr, beta1, beta2, eps, weight_decay, grad_scale, decoupled, maximize),
                              channel};
  const DeviceGuard guard(grad.device());
  with_gradient(kOp, grad.scalar_type(), [&](auto element) {
    using T = decltype(element);
    const int64_t bytes = pieces_bytes<T>(channel, sizes);
    check_slot(kOp, channel, bytes);
    launch(zero_step_kernel<T>, dim3(blocks_for(bytes / channel.world)), dim3(kThreads), 0, current_stream(grad),
           params, true);
  });
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(pypar_cuda, m) {
  m.def(
      "zero_step(Tensor(a!) param, Tensor grad, Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq, "
      "Tensor(d!)? max_exp_avg_sq, Tensor(e!)? low, Tensor? clip, int[] sizes, int step, float lr, float beta1, "
      "float beta2, float eps, float weight_decay, float grad_scale, bool decoupled, bool maximize, Tensor pointers, "
      "int rank, int slot_bytes, float timeout_s, Tensor? report=None) -> ()");
}

TORCH_LIBRARY_IMPL(pypar_cuda, CompositeExplicitAutograd, m) {
  m.impl("zero_step", zero_step);
}

}  // namespace pypar
