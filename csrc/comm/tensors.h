// Tensors as the core sees them: bytes and element types.
#pragma once

#include <vector>

#include <ATen/core/Tensor.h>
#include <torch/csrc/distributed/c10d/Types.hpp>

#include "comm/types.h"

namespace pypar {

// For moving; a type that the core can't add up moves as bytes.
DType movable_dtype(const at::Tensor& tensor);
// For reductions; ArgumentError names the type when there is no sum of it.
DType reducible_dtype(const at::Tensor& tensor, ReduceOp op);
ReduceOp core_op(const c10d::ReduceOp& op);
// A complex tensor as pairs of reals, for the reductions that allow it.
at::Tensor as_real(const at::Tensor& tensor, const c10d::ReduceOp& op);

void check_dense(const char* what, const at::Tensor& tensor);
void check_same(const char* what, const char* name, const at::Tensor& tensor, const at::Tensor& like);
[[noreturn]] void refuse(const std::string& why);

inline int64_t bytes_of(const at::Tensor& tensor) {
  return static_cast<int64_t>(tensor.nbytes());
}

// A contiguous tensor to read or to write in the place of `tensor`; write_back() copies to `tensor` what was written.
class Flat {
 public:
  explicit Flat(const at::Tensor& tensor, bool read = true);
  // The input of a reduction. ReduceOp.PREMUL_SUM sums what every rank has times its factor: this product, rounded to
  // the type of the tensor.
  Flat(const at::Tensor& tensor, const c10d::ReduceOp& op);
  void write_back();
  at::Tensor& tensor() { return flat_; }
  void* data() { return flat_.data_ptr(); }

 private:
  const at::Tensor& original_;
  at::Tensor flat_;
  const bool copied_;
};

}  // namespace pypar
