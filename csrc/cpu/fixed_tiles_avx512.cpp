#include "cpu/fixed_tiles.h"

#if defined(__x86_64__)
#include <immintrin.h>

#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,f16c,prefer-vector-width=512")
#define PYPAR_F16C
#define PYPAR_TARGET avx512
#define PYPAR_LANES 16
#define PYPAR_TILE_ROWS 6
#define PYPAR_TILE_VECTORS 4
#include "cpu/fixed_tiles_kernels.h"
#endif
