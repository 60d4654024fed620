#include "cpu/matmul.h"

#include "cpu/layout.h"

namespace pypar {

void Sizes::bind(const char* tensor, int64_t size, const char* name) {
  const auto [it, is_new] = bound_.try_emplace(name, tensor, size);
  TORCH_CHECK_VALUE(is_new || it->second.second == size, op_, ": ", name, " is ", it->second.second, " in ",
                    it->second.first, ", but ", size, " in ", tensor);
}

void Sizes::last(const char* tensor, const at::Tensor& x, const char* name) {
  bind(tensor, x.size(-1), name);
}

void Sizes::first(const char* tensor, const at::Tensor& x, const char* name) {
  bind(tensor, x.size(0), name);
}

void check_matrix(const char* op, const char* name, const at::Tensor& x, const at::Tensor& like) {
  check_cpu_tensor(op, name, x);
  TORCH_CHECK_VALUE(x.dim() == 2, op, ": ", name, " has shape ", x.sizes(), ", expected a matrix");
  const bool floating = x.scalar_type() == at::kFloat || x.scalar_type() == at::kDouble ||
                        x.scalar_type() == at::kHalf || x.scalar_type() == at::kBFloat16;
  TORCH_CHECK_VALUE(floating, op, ": ", name, " is ", x.scalar_type(),
                    ", expected float32, bfloat16, float16 or float64");
  TORCH_CHECK_VALUE(!like.defined() || x.scalar_type() == like.scalar_type(), op, ": ", name, " is ", x.scalar_type(),
                    ", expected ", like.scalar_type(), " as the first tensor is; cast it, or use autocast");
}

std::pair<int64_t, int64_t> check_products(const char* op, at::TensorList xs, at::TensorList weights) {
  TORCH_CHECK_VALUE(!xs.empty() && xs.size() == weights.size(), op, ": ", xs.size(), " inputs for ", weights.size(),
                    " weights");
  Sizes outer(op);
  for (size_t i = 0; i < xs.size(); ++i) {
    check_matrix(op, "x", xs[i], xs[0]), check_matrix(op, "w", weights[i], xs[0]);
    Sizes inner(op);
    inner.last("x", xs[i], "K"), inner.last("w", weights[i], "K");
    outer.first("x", xs[i], "M"), outer.first("w", weights[i], "N");
  }
  return {outer["M"], outer["N"]};
}

at::Tensor rows_at(const void* data, int64_t rows, int64_t cols, at::ScalarType type) {
  return at::from_blob(const_cast<void*>(data), {rows, cols}, at::TensorOptions().dtype(type));
}

void mm_into(at::Tensor out, const at::Tensor& x, const at::Tensor& w, bool accumulate) {
  if (accumulate) {
    out.addmm_(x, w.t());
  } else {
    at::mm_out(out, x, w.t());
  }
}

Epilogue::Epilogue(const char* op, const std::optional<at::Tensor>& bias, const std::optional<at::Tensor>& residual,
                   int64_t rows, int64_t cols, const at::Tensor& like) {
  if (bias.has_value() && bias->defined()) {
    TORCH_CHECK_VALUE(bias->dim() == 1 && bias->size(0) == cols && bias->scalar_type() == like.scalar_type(), op,
                      ": bias is ", bias->scalar_type(), bias->sizes(), ", expected ", like.scalar_type(), "[", cols,
                      "]");
    bias_ = *bias;
  }
  if (residual.has_value() && residual->defined()) {
    TORCH_CHECK_VALUE(residual->dim() == 2 && residual->size(0) == rows && residual->size(1) == cols &&
                          residual->scalar_type() == like.scalar_type(),
                      op, ": residual is ", residual->scalar_type(), residual->sizes(), ", expected ",
                      like.scalar_type(), "[", rows, ", ", cols, "]");
    residual_ = residual->contiguous();
  }
}

void Epilogue::operator()(int64_t begin, int64_t num, std::vector<const void*>& srcs) {
  if (bias_.defined()) {
    if (!bias_rows_.defined() || bias_rows_.size(0) < num) bias_rows_ = bias_.expand({num, -1}).contiguous();
    srcs.push_back(bias_rows_.const_data_ptr());
  }
  if (residual_.defined()) srcs.push_back(residual_.narrow(0, begin, num).const_data_ptr());
}

void Epilogue::add_to(at::Tensor& y) const {
  if (bias_.defined()) y.add_(bias_);
  if (residual_.defined()) y.add_(residual_);
}

WeightGrad::WeightGrad(int64_t rows, int64_t cols, at::ScalarType type)
    : sum_(at::empty({rows, cols}, at::TensorOptions().dtype(wide_type(type)))), type_(type) {}

void WeightGrad::add(const at::Tensor& dy, const at::Tensor& x, bool fixed) {
  const bool same = sum_.scalar_type() == type_;
  if (fixed) {
    const at::Tensor more = fixed_mm(dy.t(), x.t());
    if (empty_) {
      sum_.copy_(more);
    } else {
      sum_.add_(more);
    }
  } else if (empty_) {
    if (same) {
      at::mm_out(sum_, dy.t(), x);
    } else {
      sum_.copy_(at::mm(dy.t(), x));
    }
  } else if (same) {
    sum_.addmm_(dy.t(), x);
  } else {
    sum_.add_(at::mm(dy.t(), x));
  }
  empty_ = false;
}

at::Tensor WeightGrad::sum() {
  if (empty_) sum_.zero_();
  empty_ = false;
  return sum_;
}

at::Tensor WeightGrad::result() {
  return sum().to(type_);
}

}  // namespace pypar
