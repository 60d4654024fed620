/* Copies and sums of the references: plain, non-temporal, or the C library's memcpy. Loops are left to -O3. */
#ifndef PYPAR_BENCH_COPY_H
#define PYPAR_BENCH_COPY_H
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

enum copy_kind { kPlain, kStream, kMemcpy };
static const char* const kCopyNames[] = {"plain", "stream", "memcpy"};

static inline void stream_fence(void) {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

/* Four floats past the caches; dst is 16-byte aligned. */
static inline void store4(float* dst, const float* sum) {
#if defined(__x86_64__)
  _mm_stream_ps(dst, _mm_loadu_ps(sum));
#else
  memcpy(dst, sum, 16);
#endif
}

static inline int streams(enum copy_kind kind, const float* dst) {
  return kind == kStream && (uintptr_t)dst % 32 == 0;
}

static inline void copy(float* restrict dst, const float* restrict src, size_t num, enum copy_kind kind) {
  size_t i = 0;
#if defined(__AVX__)
  if (streams(kind, dst)) {
    for (; i + 16 <= num; i += 16) {
      _mm256_stream_ps(dst + i, _mm256_loadu_ps(src + i));
      _mm256_stream_ps(dst + i + 8, _mm256_loadu_ps(src + i + 8));
    }
    stream_fence();
  } else if (kind != kMemcpy) {
    for (; i + 16 <= num; i += 16) { /* by hand: gcc would call memcpy here */
      _mm256_storeu_ps(dst + i, _mm256_loadu_ps(src + i));
      _mm256_storeu_ps(dst + i + 8, _mm256_loadu_ps(src + i + 8));
    }
  }
#endif
  if (i < num) memcpy(dst + i, src + i, 4 * (num - i));
}

/* dst[i] = sum over r of src[r][i], in the order 0..W-1; dst may be one of src. */
static inline void sum(float* dst, const float* const* src, int world, size_t num, enum copy_kind kind) {
  size_t i = 0;
  if (streams(kind, dst)) {
    for (; i + 8 <= num; i += 8) {
      float s[8];
      for (int e = 0; e < 8; e++) s[e] = src[0][i + e] + src[1][i + e];
      for (int r = 2; r < world; r++)
        for (int e = 0; e < 8; e++) s[e] += src[r][i + e];
      store4(dst + i, s);
      store4(dst + i + 4, s + 4);
    }
    stream_fence();
  } else if (world == 2) {
    const float *a = src[0], *b = src[1];
#pragma GCC ivdep
    for (; i < num; i++) dst[i] = a[i] + b[i];
  }
  for (; i < num; i++) {
    float s = src[0][i] + src[1][i];
    for (int r = 2; r < world; r++) s += src[r][i];
    dst[i] = s;
  }
}

/* The same sum written to every dst[r]. */
static inline void sum_to_all(float* const* dst, const float* const* src, int world, size_t num, enum copy_kind kind) {
  size_t i = 0;
  if (world == 2 && !streams(kind, dst[0])) {
    const float *a = src[0], *b = src[1];
    float *x = dst[0], *y = dst[1];
#pragma GCC ivdep
    for (; i < num; i++) {
      float s = a[i] + b[i];
      x[i] = s, y[i] = s;
    }
    return;
  }
  for (; i + 8 <= num; i += 8) {
    float s[8];
    for (int e = 0; e < 8; e++) s[e] = src[0][i + e] + src[1][i + e];
    for (int r = 2; r < world; r++)
      for (int e = 0; e < 8; e++) s[e] += src[r][i + e];
    for (int r = 0; r < world; r++) {
      if (streams(kind, dst[r])) {
        store4(dst[r] + i, s);
        store4(dst[r] + i + 4, s + 4);
      } else {
        memcpy(dst[r] + i, s, sizeof s);
      }
    }
  }
  for (; i < num; i++) {
    float s = src[0][i] + src[1][i];
    for (int r = 2; r < world; r++) s += src[r][i];
    for (int r = 0; r < world; r++) dst[r][i] = s;
  }
  stream_fence();
}
#endif
