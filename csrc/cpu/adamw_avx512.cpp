#include "cpu/adamw.h"

#if defined(__x86_64__)
#include <immintrin.h>

#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,f16c,prefer-vector-width=512")
#define PYPAR_F16C
#define PYPAR_TARGET avx512
#define PYPAR_LANES 16
#define PYPAR_SQRT sqrt_of

namespace {

inline __m512 sqrt_of(__m512 x) {
  return _mm512_maskz_sqrt_ps(0xffff, x);  // without the mask GCC 12 warns of its own header
}

}  // namespace

#include "cpu/adamw_kernels.h"
#endif
