#include "cpu/adamw.h"

#if defined(__x86_64__)
#include <immintrin.h>

#pragma GCC target("avx2,f16c")
#define PYPAR_F16C
#define PYPAR_TARGET avx2
#define PYPAR_LANES 8
#define PYPAR_SQRT _mm256_sqrt_ps
#include "cpu/adamw_kernels.h"
#endif
