// Determinism "layout": a dim that a sum runs over is cut into 8 virtual shards, whatever the number of ranks; each is
// summed by fixed_product, their sums added along one binary tree, of which every rank does its own branch.
#pragma once

#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "comm/communicator.h"
#include "cpu/fixed_tiles.h"
#include "cpu/matmul.h"

namespace pypar {

inline constexpr int64_t kVirtualShards = 8;

// "layout", or "run"; anything else is refused.
bool is_layout(const char* op, std::string_view determinism);

// Where `rank`'s virtual shards of a dim begin in its part of it, and where the last one ends. sizes: of the ranks'
// parts.
std::vector<int64_t> virtual_begins(const char* op, const char* dim, at::IntArrayRef sizes, int64_t rank);

at::ScalarType wide_type(at::ScalarType type);  // float32 for half types
Factor factor_of(const at::Tensor& x);          // [rows, k]

// x @ w.T in the wide type, over one range of k.
at::Tensor fixed_mm(const at::Tensor& x, const at::Tensor& w);

// This rank's branch of the sum over i and over ranks of xs[i] @ weights[i].T, [M, N] in the wide type. sizes: of K,
// for each i those of all ranks, one list behind the other; none: the ranks' parts are equal.
struct LayoutShare {
  LayoutShare(const char* op, at::TensorList xs, at::TensorList weights, c10::OptionalArrayRef<int64_t> sizes,
              const std::string& group_name);
  at::Tensor sum;
  RowSum how;
};

// The sum over ranks of `share` along the tree.
at::Tensor tree_all_reduce(const at::Tensor& share, RowSum how, const std::string& group_name);
// For ranks that share no memory: all shares travel to every rank.
at::Tensor tree_of_gathered(const at::Tensor& share, const std::string& group_name);
// ((parts[0] + parts[1]) + (parts[2] + parts[3])) + ...; a power of two of them.
at::Tensor tree_sum(std::vector<at::Tensor> parts);

}  // namespace pypar
