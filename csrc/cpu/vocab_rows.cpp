#include "cpu/vocab_rows.h"

#include <string_view>

#include "cpu/reduce.h"

namespace pypar {

#define PYPAR_DECLARE(target)                                                                 \
  namespace target {                                                                          \
  RowStats row_stats(const void* row, int64_t columns, DType dtype, bool with_total);         \
  void row_grad(void* dst, const void* row, int64_t columns, DType dtype, const RowGrad& of); \
  }
PYPAR_DECLARE(plain)
#if defined(__x86_64__)
PYPAR_DECLARE(avx2)
PYPAR_DECLARE(avx512)
#endif

namespace {

struct Kernels {
  decltype(&plain::row_stats) stats;
  decltype(&plain::row_grad) grad;
};

Kernels choose() {
#if defined(__x86_64__)
  const std::string_view capability = cpu_capability();
  if (capability == "avx512") return {avx512::row_stats, avx512::row_grad};
  if (capability == "avx2") return {avx2::row_stats, avx2::row_grad};
#endif
  return {plain::row_stats, plain::row_grad};
}

const Kernels& kernels() {
  static const Kernels chosen = choose();
  return chosen;
}

}  // namespace

RowStats row_stats(const void* row, int64_t columns, DType dtype, bool with_total) {
  return kernels().stats(row, columns, dtype, with_total);
}

void row_grad(void* dst, const void* row, int64_t columns, DType dtype, const RowGrad& of) {
  kernels().grad(dst, row, columns, dtype, of);
}

}  // namespace pypar
