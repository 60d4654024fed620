// What the operators share: torch's types to the core's, argument checks, which transport a group has.
#pragma once

#include <string_view>

#include <ATen/ATen.h>
#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>

#include "comm/errors.h"
#include "comm/registry.h"

namespace pypar {

DType dtype_of(const at::Tensor& x);
ReduceOp reduce_op_of(std::string_view name);
c10d::ReduceOp c10d_reduce_op_of(std::string_view name);
void check_cpu_tensor(const char* op, const char* name, const at::Tensor& x);
c10::intrusive_ptr<c10d::ProcessGroup> process_group_of(const std::string& group_name);

// Rows of dim 0 that each rank holds: `splits` if given (one per rank, summing to rows), else ceil(rows / world) each,
// the last ranks fewer or none.
std::vector<int64_t> rows_per_rank(const char* op, c10::OptionalArrayRef<int64_t> splits, int64_t rows, int world);
// Elements of one row.
int64_t row_items(const at::Tensor& x);

}  // namespace pypar
