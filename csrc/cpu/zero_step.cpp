// The optimizer's step of a rank's shard: unscale, clip, AdamW, cast, publish, in one pass.

#include <cmath>

#include <torch/library.h>

#include "cpu/adamw.h"
#include "cpu/tensors.h"

namespace pypar {

namespace {

constexpr const char* kOp = "zero_step";

float* floats(const char* name, const at::Tensor& x, int64_t numel) {
  check_cpu_tensor(kOp, name, x);
  TORCH_CHECK_VALUE(x.scalar_type() == at::kFloat && x.is_contiguous() && x.numel() == numel, kOp, ": ", name, " is ",
                    x.scalar_type(), x.sizes(), x.is_contiguous() ? "" : " and not contiguous",
                    ", expected a contiguous float32 tensor of ", numel, " numbers, as param");
  return x.mutable_data_ptr<float>();
}

void zero_step(at::Tensor& param, const at::Tensor& grad, at::Tensor& exp_avg, at::Tensor& exp_avg_sq,
               const std::optional<at::Tensor>& max_exp_avg_sq, const std::optional<at::Tensor>& low, int64_t step,
               double lr, double beta1, double beta2, double eps, double weight_decay, double grad_scale,
               bool decoupled, bool maximize) {
  with_python_errors([&] {
    TORCH_CHECK_VALUE(step >= 1, kOp, ": step is ", step, ", expected 1 or more");
    const int64_t n = param.numel();
    float* p = floats("param", param, n);
    const float* g = floats("grad", grad, n);
    float* m = floats("exp_avg", exp_avg, n);
    float* v = floats("exp_avg_sq", exp_avg_sq, n);
    float* v_max = max_exp_avg_sq.has_value() ? floats("max_exp_avg_sq", *max_exp_avg_sq, n) : nullptr;
    void* out = nullptr;
    DType low_type = DType::bf16;
    if (low.has_value()) {
      const bool half = low->scalar_type() == at::kBFloat16 || low->scalar_type() == at::kHalf;
      TORCH_CHECK_VALUE(half && low->is_contiguous() && low->numel() == n, kOp, ": low is ", low->scalar_type(),
                        low->sizes(), ", expected a contiguous bfloat16 or float16 tensor of ", n, " numbers");
      out = low->mutable_data_ptr();
      low_type = dtype_of(*low);
    }
    const double correction1 = 1 - std::pow(beta1, static_cast<double>(step));
    const double correction2 = 1 - std::pow(beta2, static_cast<double>(step));
    const AdamW how{static_cast<float>(1 - lr * weight_decay),
                    static_cast<float>(weight_decay),
                    static_cast<float>(beta2),
                    static_cast<float>(eps),
                    static_cast<float>(1 - beta1),
                    static_cast<float>(1 - beta2),
                    static_cast<float>(lr / correction1),
                    static_cast<float>(std::sqrt(correction2)),
                    static_cast<float>(grad_scale),
                    decoupled,
                    maximize};
    adamw(p, g, m, v, v_max, out, low_type, n, how);
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(pypar, CPU, m) {
  m.impl("zero_step", zero_step);
}

}  // namespace pypar
