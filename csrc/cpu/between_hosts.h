// What the fused matmuls need over ranks that share no memory: the form, and sums that are rounded once.
#pragma once

#include <memory>
#include <optional>
#include <string>

#include "comm/hosts.h"
#include "cpu/decide.h"
#include "cpu/matmul.h"

namespace pypar {

// The number of chunks: as asked, or as decide() says where 0 is asked. `row_bytes`: of what travels.
int num_chunks_of(Hosts& hosts, int64_t asked, Overlap overlap, int64_t rows, int64_t row_bytes, double flop,
                  at::ScalarType type, Deadline deadline);
// Of the sum of xs[i] @ weights[i].T with N columns.
double flop_of(at::TensorList xs, int64_t N);
double flops_of(const Calibration& calibration, at::ScalarType type);

// Sums into y as they travel: in y itself, or, for a half type of which hosts add several ranks' shares, in float32.
class Sums {
 public:
  Sums(const Hosts& hosts, at::Tensor y);
  std::optional<at::Tensor> cast(const std::optional<at::Tensor>& more) const;
  const at::Tensor& wide() const { return wide_; }
  DType dtype() const { return dtype_of(wide_); }
  int64_t row_bytes() const { return wide_.size(1) * wide_.element_size(); }
  // A block of shares at `data`, as product(out) makes them in the type of y.
  template <typename Product>
  void share(int64_t num, void* data, Product&& product) const {
    at::Tensor block = rows_at(data, num, wide_.size(1), wide_.scalar_type());
    if (wide_.is_same(y_)) return product(block);
    at::Tensor rounded = at::empty(block.sizes(), y_.options());
    product(rounded);
    block.copy_(rounded);
  }
  void store();

 private:
  at::Tensor y_, wide_;
};

}  // namespace pypar
