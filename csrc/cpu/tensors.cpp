#include "cpu/tensors.h"

#include <numeric>

#include <torch/csrc/distributed/c10d/GroupRegistry.hpp>

namespace pypar {

DType dtype_of(const at::Tensor& x) {
  switch (x.scalar_type()) {
    case at::kByte: return DType::u8;
    case at::kChar: return DType::i8;
    case at::kShort: return DType::i16;
    case at::kInt: return DType::i32;
    case at::kLong: return DType::i64;
    case at::kHalf: return DType::f16;
    case at::kBFloat16: return DType::bf16;
    case at::kFloat: return DType::f32;
    case at::kDouble: return DType::f64;
    case at::kBool: return DType::boolean;
    default:
      TORCH_CHECK_VALUE(false, "pypar takes float32, bfloat16, float16, float64, integers and bool; got ",
                        x.scalar_type());
  }
}

ReduceOp reduce_op_of(std::string_view name) {
  if (name == "sum") return ReduceOp::sum;
  if (name == "avg" || name == "mean") return ReduceOp::avg;
  if (name == "max") return ReduceOp::max;
  if (name == "min") return ReduceOp::min;
  if (name == "product") return ReduceOp::product;
  if (name == "band") return ReduceOp::band;
  if (name == "bor") return ReduceOp::bor;
  if (name == "bxor") return ReduceOp::bxor;
  TORCH_CHECK_VALUE(false, "unknown reduction '", name, "'; use sum, avg, max, min, product, band, bor or bxor");
}

c10d::ReduceOp c10d_reduce_op_of(std::string_view name) {
  switch (reduce_op_of(name)) {
    case ReduceOp::avg: return c10d::ReduceOp::AVG;
    case ReduceOp::max: return c10d::ReduceOp::MAX;
    case ReduceOp::min: return c10d::ReduceOp::MIN;
    case ReduceOp::product: return c10d::ReduceOp::PRODUCT;
    case ReduceOp::band: return c10d::ReduceOp::BAND;
    case ReduceOp::bor: return c10d::ReduceOp::BOR;
    case ReduceOp::bxor: return c10d::ReduceOp::BXOR;
    default: return c10d::ReduceOp::SUM;
  }
}

void check_cpu_tensor(const char* op, const char* name, const at::Tensor& x) {
  TORCH_CHECK_VALUE(x.device().is_cpu(), op, ": ", name, " is on ", x.device(), ", expected the CPU");
  TORCH_CHECK_VALUE(x.layout() == at::kStrided, op, ": ", name, " has layout ", x.layout(), ", expected strided");
}

c10::intrusive_ptr<c10d::ProcessGroup> process_group_of(const std::string& group_name) {
  return c10d::resolve_process_group(group_name);
}

std::vector<int64_t> rows_per_rank(const char* op, c10::OptionalArrayRef<int64_t> splits, int64_t rows, int world) {
  std::vector<int64_t> counts;
  if (splits.has_value()) {
    counts = splits->vec();
    TORCH_CHECK_VALUE(static_cast<int>(counts.size()) == world, op, ": splits has ", counts.size(), " entries for ",
                      world, " ranks");
    int64_t total = 0;
    for (int64_t n : counts) {
      TORCH_CHECK_VALUE(n >= 0, op, ": splits ", *splits, " has a negative entry");
      total += n;
    }
    TORCH_CHECK_VALUE(total == rows, op, ": splits ", *splits, " sum to ", total, ", but dim 0 has ", rows, " rows");
    return counts;
  }
  const int64_t per = (rows + world - 1) / world;
  for (int64_t r = 0; r < world; ++r) counts.push_back(std::clamp<int64_t>(rows - r * per, 0, per));
  return counts;
}

int64_t row_items(const at::Tensor& x) {
  return std::accumulate(x.sizes().begin() + 1, x.sizes().end(), int64_t{1}, std::multiplies<>());
}

}  // namespace pypar
