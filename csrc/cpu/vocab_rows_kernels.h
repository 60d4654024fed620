// The kernels behind vocab_rows.h, compiled once per instruction set as those of reduce_kernels.h, and like them
// without functions of the standard library. PYPAR_LANES: float32 in a vector of the target; GCC takes wider ones apart
// lane by lane.

#include "cpu/half_kernels.h"

namespace pypar::PYPAR_TARGET {

namespace {

constexpr int64_t kBlock = 1024;  // columns that stay in L1 while they are read twice: for their max, for their sum
constexpr int64_t kLanes = PYPAR_LANES;
constexpr float kInfinity = __builtin_inff();
using Vector = float __attribute__((vector_size(4 * kLanes)));
using Loose = float __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));
using Bits = uint32_t __attribute__((vector_size(4 * kLanes)));

inline Vector load(const float* from) {
  return *reinterpret_cast<const Loose*>(from);
}
inline void store(float* to, const Vector& x) {
  *reinterpret_cast<Loose*>(to) = x;
}
// n < kLanes columns, and `rest` in the other lanes.
inline Vector load_some(const float* from, int64_t n, float rest) {
  float lanes[kLanes];
  for (int64_t i = 0; i < kLanes; ++i) lanes[i] = i < n ? from[i] : rest;
  return load(lanes);
}

// e^x for x <= 0, to 2 units in the last place; 0 below -87.7; NaN of NaN. e^x = 2^n * e^r with n an integer and
// |r| <= log(2) / 2; the polynomial of e^r has the coefficients of the Cephes library.
inline Vector exp_of(const Vector& given) {
  const Vector least = Vector{} - 88.0f;
  const Vector x = given < least ? least : given;
  const Vector magic = Vector{} + 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, seen in the low bits
  const Vector shifted = x * 1.44269504088896341f + magic;
  const Vector n = shifted - magic;
  const Vector r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  Vector p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const Bits power = (__builtin_bit_cast(Bits, shifted) + 127u) << 23;  // 2^n; n = -127 gives 0
  return p * __builtin_bit_cast(Vector, power);
}

inline double sum_of(const Vector& x) {
  double sum = 0;
  for (int64_t i = 0; i < kLanes; ++i) sum += static_cast<double>(x[i]);
  return sum;
}

inline float max_of_block(const float* x, int64_t n) {
  Vector most = Vector{} - kInfinity, also = most;
  int64_t i = 0;
  for (; i + 2 * kLanes <= n; i += 2 * kLanes) {
    const Vector a = load(x + i), b = load(x + i + kLanes);
    most = a > most ? a : most;  // NaN is passed over here; it makes the sum NaN
    also = b > also ? b : also;
  }
  most = also > most ? also : most;
  float max = -kInfinity;
  for (int64_t k = 0; k < kLanes; ++k) max = most[k] > max ? most[k] : max;
  for (; i < n; ++i) max = x[i] > max ? x[i] : max;
  return max;
}

inline double exp_sum_of_block(const float* x, int64_t n, float shift) {
  Vector sum{};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) sum += exp_of(load(x + i) - shift);
  if (i < n) sum += exp_of(load_some(x + i, n - i, -kInfinity) - shift);
  return sum_of(sum);
}

inline double sum_of_block(const float* x, int64_t n) {
  Vector sum{};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) sum += load(x + i);
  if (i < n) sum += load_some(x + i, n - i, 0.0f);
  return sum_of(sum);
}

// A block as float32: where it lies, or widened.
inline const float* block_of(const float* x, int64_t, float*) {
  return x;
}
template <typename T>
const float* block_of(const T* x, int64_t n, float* wide) {
  load_block(wide, x, n);
  return wide;
}

template <typename T>
RowStats stats_of(const T* row, int64_t columns, bool with_total) {
  float wide[kBlock];
  float max = -kInfinity;
  double sum = 0, total = 0;
  for (int64_t begin = 0; begin < columns; begin += kBlock) {
    const int64_t n = columns - begin < kBlock ? columns - begin : kBlock;
    const float* x = block_of(row + begin, n, wide);
    const float block_max = max_of_block(x, n);
    if (block_max > max) {
      if (sum != 0) sum *= __builtin_exp(static_cast<double>(max) - static_cast<double>(block_max));
      max = block_max;
    }
    // All -inf so far: e^-inf = 0, where -inf minus -inf would be NaN.
    sum += exp_sum_of_block(x, n, max == -kInfinity ? 0.0f : max);
    if (with_total) total += sum_of_block(x, n);
  }
  return {static_cast<double>(max), sum, total};
}

RowStats stats_of(const double* row, int64_t columns, bool with_total) {
  RowStats s{-__builtin_inf(), 0, 0};
  for (int64_t v = 0; v < columns; ++v) s.max = row[v] > s.max ? row[v] : s.max;
  const double shift = s.max == -__builtin_inf() ? 0.0 : s.max;
  for (int64_t v = 0; v < columns; ++v) s.sum += __builtin_exp(row[v] - shift);
  for (int64_t v = 0; with_total && v < columns; ++v) s.total += row[v];
  return s;
}

template <typename T>
void grad_of(T* dst, const T* row, int64_t columns, const RowGrad& of) {
  const auto max = static_cast<float>(of.max), scale = static_cast<float>(of.scale), less = static_cast<float>(of.less);
  float wide[kBlock], grads[kBlock];
  float hot = 0;
  if (of.hot >= 0) {
    const float* x = block_of(row + of.hot, 1, wide);
    hot = (exp_of(Vector{} + (x[0] - max)) * scale - less)[0] - static_cast<float>(of.hot_less);
  }
  for (int64_t begin = 0; begin < columns; begin += kBlock) {
    const int64_t n = columns - begin < kBlock ? columns - begin : kBlock;
    const float* x = block_of(row + begin, n, wide);
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) store(grads + i, exp_of(load(x + i) - max) * scale - less);
    if (i < n) {
      const Vector last = exp_of(load_some(x + i, n - i, -kInfinity) - max) * scale - less;
      for (int64_t k = 0; i + k < n; ++k) grads[i + k] = last[k];
    }
    store_block(dst + begin, grads, n);
  }
  if (of.hot >= 0) store_block(dst + of.hot, &hot, 1);
}

void grad_of(double* dst, const double* row, int64_t columns, const RowGrad& of) {
  const double hot = of.hot < 0 ? 0 : __builtin_exp(row[of.hot] - of.max) * of.scale - of.less - of.hot_less;
  for (int64_t v = 0; v < columns; ++v) dst[v] = __builtin_exp(row[v] - of.max) * of.scale - of.less;
  if (of.hot >= 0) dst[of.hot] = hot;
}

}  // namespace

RowStats row_stats(const void* row, int64_t columns, DType dtype, bool with_total) {
  switch (dtype) {
    case DType::f64: return stats_of(static_cast<const double*>(row), columns, with_total);
    case DType::bf16: return stats_of(static_cast<const Bf16*>(row), columns, with_total);
    case DType::f16: return stats_of(static_cast<const F16*>(row), columns, with_total);
    default: return stats_of(static_cast<const float*>(row), columns, with_total);
  }
}

void row_grad(void* dst, const void* row, int64_t columns, DType dtype, const RowGrad& of) {
  switch (dtype) {
    case DType::f64: return grad_of(static_cast<double*>(dst), static_cast<const double*>(row), columns, of);
    case DType::bf16: return grad_of(static_cast<Bf16*>(dst), static_cast<const Bf16*>(row), columns, of);
    case DType::f16: return grad_of(static_cast<F16*>(dst), static_cast<const F16*>(row), columns, of);
    default: return grad_of(static_cast<float*>(dst), static_cast<const float*>(row), columns, of);
  }
}

}  // namespace pypar::PYPAR_TARGET
