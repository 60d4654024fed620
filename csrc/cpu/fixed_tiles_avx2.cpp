#include "cpu/fixed_tiles.h"

#if defined(__x86_64__)
#include <immintrin.h>

#pragma GCC target("avx2,f16c")
#define PYPAR_F16C
#define PYPAR_TARGET avx2
#define PYPAR_LANES 8
#define PYPAR_TILE_ROWS 4
#define PYPAR_TILE_VECTORS 3
#include "cpu/fixed_tiles_kernels.h"
#endif
