#include "cpu/vocab_rows.h"

#if defined(__x86_64__)
#include <immintrin.h>

#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,f16c,prefer-vector-width=512")
#define PYPAR_F16C
#define PYPAR_TARGET avx512
#define PYPAR_LANES 16
#include "cpu/vocab_rows_kernels.h"
#endif
