// Full gradients to a shard of their mean: read where they lie, summed in float32 in rank order, and measured on the
// way.

#include <algorithm>
#include <array>
#include <numeric>

#include <torch/library.h>

#include "cpu/reduce.h"
#include "cpu/tensors.h"

namespace pypar {

namespace {

constexpr const char* kOp = "zero_scatter";
constexpr int64_t kBlock = 2048;  // elements that stay in L1 from their sum to their square
constexpr int kLanes = 8;

// sum[i] = srcs[0][i] + srcs[1][i] + ... in float32.
template <typename T>
void sum_wide(float* sum, const void* const* srcs, int world, int64_t begin, int64_t n) {
  for (int r = 0; r < world; ++r) {
    const T* src = static_cast<const T*>(srcs[r]) + begin;
    for (int64_t i = 0; i < n; ++i) sum[i] = r == 0 ? static_cast<float>(src[i]) : sum[i] + static_cast<float>(src[i]);
  }
}

// shard = scale * sum (+ shard); returns the sum of the squares of what is there then.
double scale_into(float* __restrict shard, const float* __restrict sum, int64_t n, float scale, bool accumulate) {
  float lanes[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int k = 0; k < kLanes; ++k) {
      const float x = sum[i + k] * scale + (accumulate ? shard[i + k] : 0.0f);
      shard[i + k] = x;
      lanes[k] += x * x;
    }
  }
  double squares = 0;
  for (float lane : lanes) squares += static_cast<double>(lane);
  for (; i < n; ++i) {
    const float x = sum[i] * scale + (accumulate ? shard[i] : 0.0f);
    shard[i] = x;
    squares += static_cast<double>(x) * static_cast<double>(x);
  }
  return squares;
}

at::Tensor zero_scatter(at::Tensor& shard, const at::Tensor& full, at::IntArrayRef sizes, double scale, bool accumulate,
                        c10::string_view group_name) {
  return with_python_errors([&] {
    check_cpu_tensor(kOp, "shard", shard), check_cpu_tensor(kOp, "full", full);
    const auto group = process_group_of(std::string(group_name));
    const int world = group->getSize(), rank = group->getRank();
    const int64_t total = std::accumulate(sizes.begin(), sizes.end(), int64_t{0});
    TORCH_CHECK_VALUE(static_cast<int>(sizes.size()) == world && full.dim() == 1 && full.size(0) == total, kOp,
                      ": sizes ", sizes, " don't cut full ", full.sizes(), " for ", world, " ranks");
    const auto type = full.scalar_type();
    TORCH_CHECK_VALUE(type == at::kFloat || type == at::kBFloat16 || type == at::kHalf, kOp, ": full is ", type,
                      ", expected float32, bfloat16 or float16");
    TORCH_CHECK_VALUE(
        shard.scalar_type() == at::kFloat && shard.is_contiguous() && shard.numel() == sizes[static_cast<size_t>(rank)],
        kOp, ": shard is ", shard.scalar_type(), shard.sizes(), ", expected a contiguous float32 tensor of ",
        sizes[static_cast<size_t>(rank)], " numbers on rank ", rank);
    const at::Tensor source = full.contiguous();
    double squares = 0;
    float* out = shard.mutable_data_ptr<float>();
    auto reduce = [&](int64_t begin, int64_t num, const void* const* srcs, int num_srcs) {
      alignas(64) float sum[kBlock];
      for (int64_t at = 0; at < num; at += kBlock) {
        const int64_t n = std::min(kBlock, num - at);
        if (type == at::kFloat) {
          std::array<const void*, kMaxWorld> parts;
          for (int r = 0; r < num_srcs; ++r) {
            parts[static_cast<size_t>(r)] = static_cast<const float*>(srcs[r]) + at;
          }
          reduce_rows(sum, parts.data(), num_srcs, n, DType::f32, ReduceOp::sum);
        } else if (type == at::kBFloat16) {
          sum_wide<at::BFloat16>(sum, srcs, num_srcs, at, n);
        } else {
          sum_wide<at::Half>(sum, srcs, num_srcs, at, n);
        }
        squares += scale_into(out + begin + at, sum, n, static_cast<float>(scale), accumulate);
      }
    };
    if (const auto communicator = find_communicator(std::string(group_name))) {
      std::vector<const void*> ins;
      const auto* data = static_cast<const std::byte*>(source.const_data_ptr());
      for (int64_t size : sizes) {
        ins.push_back(data);
        data += static_cast<size_t>(size) * source.element_size();
      }
      communicator->reduce_scatter(
          ins.data(), sizes.data(),
          [&](int64_t begin, int64_t num, const void* const* srcs) { reduce(begin, num, srcs, communicator->world()); },
          dtype_of(source), ReduceOp::sum, communicator->default_deadline());
    } else {
      at::Tensor sum = source.to(at::kFloat, /*non_blocking=*/false, /*copy=*/true);
      std::vector<at::Tensor> tensors{sum};
      group->allreduce(tensors, {})->wait();
      const int64_t before = std::accumulate(sizes.begin(), sizes.begin() + rank, int64_t{0});
      squares =
          scale_into(out, sum.const_data_ptr<float>() + before, shard.numel(), static_cast<float>(scale), accumulate);
    }
    return at::scalar_tensor(squares, at::TensorOptions().dtype(at::kDouble));
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(pypar, CPU, m) {
  m.impl("zero_scatter", zero_scatter);
}

}  // namespace pypar
