// The kernels behind reduce_rows, compiled once per instruction set: the including file sets the target and
// PYPAR_TARGET, a namespace. Only plain loops here: an inline function of the standard library, compiled for AVX-512,
// could be the copy that the linker keeps for everybody.

#include "cpu/half_kernels.h"

namespace pypar::PYPAR_TARGET {

namespace {

constexpr int64_t kBlock = 1024;  // float32 accumulators of 4 KiB stay in L1

struct Sum {
  template <typename T>
  static T apply(T a, T b) {
    return static_cast<T>(a + b);
  }
};
struct Product {
  template <typename T>
  static T apply(T a, T b) {
    return static_cast<T>(a * b);
  }
};
// A NaN on any rank is a NaN on all.
struct Min {
  template <typename T>
  static T apply(T a, T b) {
    return (b < a) | (b != b) ? b : a;
  }
};
struct Max {
  template <typename T>
  static T apply(T a, T b) {
    return (b > a) | (b != b) ? b : a;
  }
};
struct And {
  template <typename T>
  static T apply(T a, T b) {
    return static_cast<T>(a & b);
  }
};
struct Or {
  template <typename T>
  static T apply(T a, T b) {
    return static_cast<T>(a | b);
  }
};
struct Xor {
  template <typename T>
  static T apply(T a, T b) {
    return static_cast<T>(a ^ b);
  }
};

// Types that are their own accumulator. kScale is a compile-time flag: a factor of 1.0 would cost a multiply.
template <typename F, bool kScale, typename T>
void reduce_direct(void* const* dsts, int num_dsts, const void* const* srcs, int num_srcs, int64_t count, T scale) {
  const T* a = static_cast<const T*>(srcs[0]);
  const T* b = static_cast<const T*>(srcs[1]);
  if (num_srcs == 2 && num_dsts <= 2) {
    T* dst = static_cast<T*>(dsts[0]);
    T* also = static_cast<T*>(dsts[num_dsts - 1]);
    if (num_dsts == 1) {
#pragma GCC ivdep
      for (int64_t i = 0; i < count; ++i) {
        const T x = F::apply(a[i], b[i]);
        dst[i] = kScale ? static_cast<T>(x * scale) : x;
      }
    } else {
#pragma GCC ivdep
      for (int64_t i = 0; i < count; ++i) {
        const T x = F::apply(a[i], b[i]);
        dst[i] = also[i] = kScale ? static_cast<T>(x * scale) : x;
      }
    }
    return;
  }
  T acc[kBlock];
  for (int64_t begin = 0; begin < count; begin += kBlock) {
    const int64_t n = count - begin < kBlock ? count - begin : kBlock;
    for (int64_t i = 0; i < n; ++i) acc[i] = F::apply(a[begin + i], b[begin + i]);
    for (int s = 2; s < num_srcs; ++s) {
      const T* src = static_cast<const T*>(srcs[s]) + begin;
      for (int64_t i = 0; i < n; ++i) acc[i] = F::apply(acc[i], src[i]);
    }
    if (kScale) {
      for (int64_t i = 0; i < n; ++i) acc[i] = static_cast<T>(acc[i] * scale);
    }
    for (int d = 0; d < num_dsts; ++d) {
      T* dst = static_cast<T*>(dsts[d]) + begin;
      for (int64_t i = 0; i < n; ++i) dst[i] = acc[i];
    }
  }
}

// Half types: float32 accumulators, one rounding.
template <typename F, bool kScale, typename T>
void reduce_widened(void* const* dsts, int num_dsts, const void* const* srcs, int num_srcs, int64_t count,
                    float scale) {
  float acc[kBlock];
  float wide[kBlock];
  for (int64_t begin = 0; begin < count; begin += kBlock) {
    const int64_t n = count - begin < kBlock ? count - begin : kBlock;
    load_block(acc, static_cast<const T*>(srcs[0]) + begin, n);
    for (int s = 1; s < num_srcs; ++s) {
      load_block(wide, static_cast<const T*>(srcs[s]) + begin, n);
      for (int64_t i = 0; i < n; ++i) acc[i] = F::apply(acc[i], wide[i]);
    }
    if (kScale) {
      for (int64_t i = 0; i < n; ++i) acc[i] *= scale;
    }
    for (int d = 0; d < num_dsts; ++d) store_block(static_cast<T*>(dsts[d]) + begin, acc, n);
  }
}

template <typename T>
void reduce_float(void* const* dsts, int num_dsts, const void* const* srcs, int num_srcs, int64_t count, ReduceOp op) {
  const T scale = static_cast<T>(1) / static_cast<T>(num_srcs);
  switch (op) {
    case ReduceOp::avg: return reduce_direct<Sum, true, T>(dsts, num_dsts, srcs, num_srcs, count, scale);
    case ReduceOp::product: return reduce_direct<Product, false, T>(dsts, num_dsts, srcs, num_srcs, count, scale);
    case ReduceOp::min: return reduce_direct<Min, false, T>(dsts, num_dsts, srcs, num_srcs, count, scale);
    case ReduceOp::max: return reduce_direct<Max, false, T>(dsts, num_dsts, srcs, num_srcs, count, scale);
    default: return reduce_direct<Sum, false, T>(dsts, num_dsts, srcs, num_srcs, count, scale);
  }
}

template <typename T>
void reduce_half(void* const* dsts, int num_dsts, const void* const* srcs, int num_srcs, int64_t count, ReduceOp op) {
  const float scale = 1.0f / static_cast<float>(num_srcs);
  switch (op) {
    case ReduceOp::avg: return reduce_widened<Sum, true, T>(dsts, num_dsts, srcs, num_srcs, count, scale);
    case ReduceOp::product: return reduce_widened<Product, false, T>(dsts, num_dsts, srcs, num_srcs, count, scale);
    case ReduceOp::min: return reduce_widened<Min, false, T>(dsts, num_dsts, srcs, num_srcs, count, scale);
    case ReduceOp::max: return reduce_widened<Max, false, T>(dsts, num_dsts, srcs, num_srcs, count, scale);
    default: return reduce_widened<Sum, false, T>(dsts, num_dsts, srcs, num_srcs, count, scale);
  }
}

template <typename T>
void reduce_integer(void* const* dsts, int num_dsts, const void* const* srcs, int num_srcs, int64_t count,
                    ReduceOp op) {
  switch (op) {
    case ReduceOp::product: return reduce_direct<Product, false, T>(dsts, num_dsts, srcs, num_srcs, count, 1);
    case ReduceOp::min: return reduce_direct<Min, false, T>(dsts, num_dsts, srcs, num_srcs, count, 1);
    case ReduceOp::max: return reduce_direct<Max, false, T>(dsts, num_dsts, srcs, num_srcs, count, 1);
    case ReduceOp::band: return reduce_direct<And, false, T>(dsts, num_dsts, srcs, num_srcs, count, 1);
    case ReduceOp::bor: return reduce_direct<Or, false, T>(dsts, num_dsts, srcs, num_srcs, count, 1);
    case ReduceOp::bxor: return reduce_direct<Xor, false, T>(dsts, num_dsts, srcs, num_srcs, count, 1);
    default: return reduce_direct<Sum, false, T>(dsts, num_dsts, srcs, num_srcs, count, 1);
  }
}

}  // namespace

void reduce(void* const* dsts, int num_dsts, const void* const* srcs, int num_srcs, int64_t count, DType dtype,
            ReduceOp op) {
  switch (dtype) {
    case DType::f32: return reduce_float<float>(dsts, num_dsts, srcs, num_srcs, count, op);
    case DType::f64: return reduce_float<double>(dsts, num_dsts, srcs, num_srcs, count, op);
    case DType::bf16: return reduce_half<Bf16>(dsts, num_dsts, srcs, num_srcs, count, op);
    case DType::f16: return reduce_half<F16>(dsts, num_dsts, srcs, num_srcs, count, op);
    // Unsigned, so that overflow wraps without undefined behaviour; order matters to min and max only.
    case DType::i8: return reduce_integer<int8_t>(dsts, num_dsts, srcs, num_srcs, count, op);
    case DType::i16: return reduce_integer<int16_t>(dsts, num_dsts, srcs, num_srcs, count, op);
    case DType::i32:
      if (op == ReduceOp::min || op == ReduceOp::max)
        return reduce_integer<int32_t>(dsts, num_dsts, srcs, num_srcs, count, op);
      return reduce_integer<uint32_t>(dsts, num_dsts, srcs, num_srcs, count, op);
    case DType::i64:
      if (op == ReduceOp::min || op == ReduceOp::max)
        return reduce_integer<int64_t>(dsts, num_dsts, srcs, num_srcs, count, op);
      return reduce_integer<uint64_t>(dsts, num_dsts, srcs, num_srcs, count, op);
    case DType::boolean:  // 0 or 1: sum is "or", product is "and"
      if (op == ReduceOp::sum || op == ReduceOp::max) op = ReduceOp::bor;
      if (op == ReduceOp::product || op == ReduceOp::min) op = ReduceOp::band;
      return reduce_integer<uint8_t>(dsts, num_dsts, srcs, num_srcs, count, op);
    default: return reduce_integer<uint8_t>(dsts, num_dsts, srcs, num_srcs, count, op);
  }
}

}  // namespace pypar::PYPAR_TARGET
