#include "cpu/fixed_tiles.h"

#define PYPAR_TARGET plain
#define PYPAR_LANES 4
#define PYPAR_TILE_ROWS 4
#define PYPAR_TILE_VECTORS 2
#include "cpu/fixed_tiles_kernels.h"
