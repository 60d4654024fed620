#include "comm/tensors.h"

#include <ATen/ATen.h>

#include "cpu/reduce.h"

namespace pypar {

void refuse(const std::string& why) {
  throw ArgumentError("pypar: " + why);
}

namespace {

// Returns false for types that the core doesn't know.
bool known_dtype(at::ScalarType type, DType* dtype) {
  switch (type) {
    case at::kByte: *dtype = DType::u8; return true;
    case at::kChar: *dtype = DType::i8; return true;
    case at::kShort: *dtype = DType::i16; return true;
    case at::kInt: *dtype = DType::i32; return true;
    case at::kLong: *dtype = DType::i64; return true;
    case at::kHalf: *dtype = DType::f16; return true;
    case at::kBFloat16: *dtype = DType::bf16; return true;
    case at::kFloat: *dtype = DType::f32; return true;
    case at::kDouble: *dtype = DType::f64; return true;
    case at::kBool: *dtype = DType::boolean; return true;
    default: return false;
  }
}

}  // namespace

DType movable_dtype(const at::Tensor& tensor) {
  DType dtype = DType::bytes;
  known_dtype(tensor.scalar_type(), &dtype);
  return dtype;
}

DType reducible_dtype(const at::Tensor& tensor, ReduceOp op) {
  DType dtype;
  if (!known_dtype(tensor.scalar_type(), &dtype)) {
    refuse(std::string("no reduction for tensors of type ") + c10::toString(tensor.scalar_type()));
  }
  check_reduction(dtype, op);
  return dtype;
}

ReduceOp core_op(const c10d::ReduceOp& op) {
  switch (op.op_) {
    case c10d::ReduceOp::SUM: return ReduceOp::sum;
    case c10d::ReduceOp::AVG: return ReduceOp::avg;
    case c10d::ReduceOp::PRODUCT: return ReduceOp::product;
    case c10d::ReduceOp::MIN: return ReduceOp::min;
    case c10d::ReduceOp::MAX: return ReduceOp::max;
    case c10d::ReduceOp::BAND: return ReduceOp::band;
    case c10d::ReduceOp::BOR: return ReduceOp::bor;
    case c10d::ReduceOp::BXOR: return ReduceOp::bxor;
    case c10d::ReduceOp::PREMUL_SUM: return ReduceOp::sum;  // Flat multiplies
    default: refuse("unknown ReduceOp");
  }
}

at::Tensor as_real(const at::Tensor& tensor, const c10d::ReduceOp& asked) {
  const ReduceOp op = core_op(asked);
  if (asked.op_ == c10d::ReduceOp::PREMUL_SUM && !tensor.is_floating_point() && !tensor.is_complex()) {
    refuse(std::string("ReduceOp.PREMUL_SUM takes floating-point tensors, got ") + c10::toString(tensor.scalar_type()));
  }
  if (!tensor.is_complex()) return tensor;
  if (op != ReduceOp::sum && op != ReduceOp::avg) {
    refuse(std::string("the reduction ") + name_of(op) + " has no meaning for complex tensors");
  }
  return at::view_as_real(tensor);
}

void check_dense(const char* what, const at::Tensor& tensor) {
  if (tensor.layout() != at::kStrided) refuse(std::string(what) + " takes dense tensors, got a sparse one");
  if (!tensor.device().is_cpu()) {
    refuse(std::string(what) + " takes CPU tensors, got one on " + tensor.device().str() +
           "; use init_process_group(\"cpu:pypar,cuda:nccl\")");
  }
}

void check_same(const char* what, const char* name, const at::Tensor& tensor, const at::Tensor& like) {
  check_dense(what, tensor);
  if (tensor.scalar_type() != like.scalar_type()) {
    refuse(std::string(what) + ": " + name + " is " + c10::toString(tensor.scalar_type()) + ", expected " +
           c10::toString(like.scalar_type()));
  }
}

namespace {

bool needs_copy(const at::Tensor& tensor) {
  return !tensor.is_contiguous() || tensor.is_conj() || tensor.is_neg();
}

}  // namespace

Flat::Flat(const at::Tensor& tensor, bool read) : original_(tensor), copied_(needs_copy(tensor)) {
  if (!copied_) {
    flat_ = tensor;
  } else {
    at::NoGradGuard no_grad;
    flat_ = at::empty(tensor.sizes(), tensor.options());
    if (read) flat_.copy_(tensor);
  }
}

Flat::Flat(const at::Tensor& tensor, const c10d::ReduceOp& op)
    : original_(tensor), copied_(needs_copy(tensor) || op.op_ == c10d::ReduceOp::PREMUL_SUM) {
  at::NoGradGuard no_grad;
  flat_ = copied_ ? at::empty(tensor.sizes(), tensor.options()).copy_(tensor) : tensor;
  if (op.op_ != c10d::ReduceOp::PREMUL_SUM) return;
  const auto* given = dynamic_cast<const c10d::PreMulSumSupplement*>(op.supplement_.get());
  if (given == nullptr) refuse("ReduceOp.PREMUL_SUM without a factor");
  const double factor = given->tensor_factor.defined() ? given->tensor_factor.item<double>() : given->double_factor;
  // As a tensor without dimensions: it does not change the type, and, unlike a Scalar, isn't rounded to it.
  flat_.mul_(at::scalar_tensor(factor, at::kDouble));
}

void Flat::write_back() {
  if (!copied_) return;
  at::NoGradGuard no_grad;
  original_.copy_(flat_);
}

}  // namespace pypar
