// One rank's columns of one row of logits: what the loss needs of them, and their gradient.
#pragma once

#include <cstdint>

#include "comm/types.h"

namespace pypar {

// max over the columns; sum of e^(x - max); total, the sum of x if it was asked for. No columns: -inf, 0, 0.
// float32 inside for half types and float32, the partial sums of 1024 columns added in float64. One pass over memory.
struct RowStats {
  double max, sum, total;
};
RowStats row_stats(const void* row, int64_t columns, DType dtype, bool with_total);

// dst[v] = e^(row[v] - max) * scale - less, and hot_less less in column `hot` (-1: none). Each column is read before it
// is written: dst may be row. Rounded once.
struct RowGrad {
  double max, scale, less, hot_less;
  int64_t hot;
};
void row_grad(void* dst, const void* row, int64_t columns, DType dtype, const RowGrad& of);

}  // namespace pypar
