#include "cpu/reduce.h"

#if defined(__x86_64__)
#include <immintrin.h>

#pragma GCC target("avx2,f16c")
#define PYPAR_F16C
#define PYPAR_TARGET avx2
#include "cpu/reduce_kernels.h"
#endif
