// What the fused matmuls share: argument checks that read like the shapes, and products of rows that lie anywhere.
#pragma once

#include <map>
#include <optional>
#include <utility>
#include <vector>

#include "cpu/tensors.h"

namespace pypar {

// Named sizes, bound by the first tensor that has them and checked by the next: "K", "N".
class Sizes {
 public:
  explicit Sizes(const char* op) : op_(op) {}
  // x is [..., name]; binds or checks its last dim.
  void last(const char* tensor, const at::Tensor& x, const char* name);
  void first(const char* tensor, const at::Tensor& x, const char* name);
  int64_t operator[](const std::string& name) const { return bound_.at(name).second; }

 private:
  void bind(const char* tensor, int64_t size, const char* name);
  const char* op_;
  std::map<std::string, std::pair<std::string, int64_t>> bound_;
};

// A CPU matrix of a floating type, of the type of `like` if that is defined.
void check_matrix(const char* op, const char* name, const at::Tensor& x, const at::Tensor& like);

// The sizes [M, N] of the sum of xs[i] @ weights[i].T; x [M, K], w [N, K].
std::pair<int64_t, int64_t> check_products(const char* op, at::TensorList xs, at::TensorList weights);

// A matrix [rows, cols] over memory that somebody else owns.
at::Tensor rows_at(const void* data, int64_t rows, int64_t cols, at::ScalarType type);

// out = x @ w.T, and added to what is there. w is [N, K] or the transpose of such a matrix.
void mm_into(at::Tensor out, const at::Tensor& x, const at::Tensor& w, bool accumulate);

// What a reduce adds after the ranks' shares: a bias [N] to every row, a residual [M, N] row by row. Either may be
// undefined. For Communicator's `more`.
class Epilogue {
 public:
  Epilogue(const char* op, const std::optional<at::Tensor>& bias, const std::optional<at::Tensor>& residual,
           int64_t rows, int64_t cols, const at::Tensor& like);
  void operator()(int64_t begin, int64_t num, std::vector<const void*>& srcs);
  // For sums that were made elsewhere.
  void add_to(at::Tensor& y) const;

 private:
  at::Tensor bias_, bias_rows_, residual_;
};

// A sum of dy.T @ x over blocks of rows, taken in the order in which they are added; float32 for half types.
class WeightGrad {
 public:
  WeightGrad(int64_t rows, int64_t cols, at::ScalarType type);
  // fixed: by fixed_mm.
  void add(const at::Tensor& dy, const at::Tensor& x, bool fixed = false);
  at::Tensor sum();     // unrounded
  at::Tensor result();  // of the type of the factors

 private:
  at::Tensor sum_;
  at::ScalarType type_;
  bool empty_ = true;
};

}  // namespace pypar
