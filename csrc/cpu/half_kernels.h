// The half types and their way to float32 and back, for kernels that are compiled once per instruction set: the
// including file sets the target, PYPAR_TARGET (a namespace) and, where the target has F16C, PYPAR_F16C.

namespace pypar::PYPAR_TARGET {

namespace {

struct Bf16 {
  uint16_t bits;
};
struct F16 {
  uint16_t bits;
};

inline float widen(Bf16 x) {
  return __builtin_bit_cast(float, static_cast<uint32_t>(x.bits) << 16);
}

inline Bf16 narrow_bf16(float x) {
  const uint32_t bits = __builtin_bit_cast(uint32_t, x);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return {static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded)};
}

#ifdef PYPAR_F16C
inline float widen(F16 x) {
  return _cvtsh_ss(x.bits);
}
inline F16 narrow_f16(float x) {
  return {static_cast<uint16_t>(_cvtss_sh(x, 0))};
}
#else
// Exponent re-biasing through float arithmetic: exact for normal and subnormal numbers, infinities and NaN.
inline float widen(F16 x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
  const uint32_t magnitude = static_cast<uint32_t>(x.bits & 0x7fffu) << 13;
  const float scaled = __builtin_bit_cast(float, magnitude) * __builtin_bit_cast(float, 0x77800000u);  // 2^112
  uint32_t bits = __builtin_bit_cast(uint32_t, scaled);
  if ((x.bits & 0x7c00u) == 0x7c00u) bits = 0x7f800000u | magnitude;
  return __builtin_bit_cast(float, bits | sign);
}
inline F16 narrow_f16(float x) {
  const uint32_t bits = __builtin_bit_cast(uint32_t, x);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  uint32_t half;
  if (magnitude > 0x7f800000u) {
    half = 0x7e00u;
  } else if (magnitude >= 0x477ff000u) {
    half = 0x7c00u;
  } else if (magnitude < 0x38800000u) {  // subnormal half: let the adder of float32 round at the right bit
    const float rounded = __builtin_bit_cast(float, magnitude) + 0.5f;
    half = __builtin_bit_cast(uint32_t, rounded) - 0x3f000000u;
  } else {
    half = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  }
  return {static_cast<uint16_t>(half | sign)};
}
#endif

inline void load_block(float* acc, const float* src, int64_t n) {
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i) acc[i] = src[i];
}
inline void load_block(float* acc, const Bf16* src, int64_t n) {
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i) acc[i] = widen(src[i]);
}
inline void load_block(float* acc, const F16* src, int64_t n) {
  int64_t i = 0;
#ifdef PYPAR_F16C
  for (; i + 8 <= n; i += 8) {
    _mm256_storeu_ps(acc + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(src + i))));
  }
#endif
  for (; i < n; ++i) acc[i] = widen(src[i]);
}
inline void store_block(float* dst, const float* acc, int64_t n) {
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i) dst[i] = acc[i];
}
inline void store_block(Bf16* dst, const float* acc, int64_t n) {
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i) dst[i] = narrow_bf16(acc[i]);
}
inline void store_block(F16* dst, const float* acc, int64_t n) {
  int64_t i = 0;
#ifdef PYPAR_F16C
  for (; i + 8 <= n; i += 8) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(dst + i), _mm256_cvtps_ph(_mm256_loadu_ps(acc + i), 0));
  }
#endif
  for (; i < n; ++i) dst[i] = narrow_f16(acc[i]);
}

}  // namespace

}  // namespace pypar::PYPAR_TARGET
