#include "cpu/vocab_rows.h"

#if defined(__x86_64__)
#include <immintrin.h>

#pragma GCC target("avx2,f16c")
#define PYPAR_F16C
#define PYPAR_TARGET avx2
#define PYPAR_LANES 8
#include "cpu/vocab_rows_kernels.h"
#endif
