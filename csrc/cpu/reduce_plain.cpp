#include "cpu/reduce.h"

#define PYPAR_TARGET plain
#include "cpu/reduce_kernels.h"
