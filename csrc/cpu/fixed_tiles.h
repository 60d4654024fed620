// Matrix products whose bits depend on the factors and on the range of k alone, never on how many rows and columns
// there are, on their place, on alignment, threads or the instruction set. docs/design/0005-layout-determinism.md
#pragma once

#include <cstdint>
#include <vector>

#include "comm/types.h"

namespace pypar {

// k is taken in blocks of 256 from the start of the range. Inside a block, from 0.0: sum = sum + a[k] * b[k], product
// and sum rounded each, in the order of k; then the sums of the blocks, in order. Float32 for half types.
inline constexpr int64_t kFixedBlock = 256;

// One factor: rows of k elements. Strides in elements, any.
struct Factor {
  const void* data;
  int64_t row_stride, k_stride;
};

// a and b, over the ranges of k that begin at begins[p] and end at begins[p + 1].
struct FixedTerm {
  Factor a, b;
  std::vector<int64_t> begins;
};

// out[m * N + n] = the sum over p of part[p], along a binary tree (num_parts is a power of two): ((0 + 1) + (2 + 3)) +
// ... part[p] = the sum over terms of sums over range p, each term going on where the last one stopped. out: float32
// for half types, else dtype.
void fixed_product(const std::vector<FixedTerm>& terms, int num_parts, DType dtype, int64_t M, int64_t N, void* out);

// What a kernel of one instruction set offers to fixed_product. T: float for half types and float32, else double.
struct FixedTiles {
  int64_t rows, cols, lanes;  // of the register tile for this type; columns of a narrower one are whole lanes
  // dst: panels of `width` rows, each [k][width]; the last one as narrow as whole `lanes` allow, zeros behind the rows.
  void (*pack)(void* dst, const Factor& from, DType dtype, int64_t rows, int64_t k, int64_t width, int64_t lanes);
  // c[rows, cols] (+)= the block's sums; a is packed by `rows`, b by `cols`. c is written in whole tiles.
  void (*multiply)(const void* a, const void* b, int64_t rows, int64_t cols, int64_t k, void* c, int64_t c_stride,
                   bool add);
  // to += from
  void (*add)(void* to, const void* from, int64_t count);
};

}  // namespace pypar
