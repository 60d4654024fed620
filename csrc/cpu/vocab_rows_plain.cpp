#include "cpu/vocab_rows.h"

#define PYPAR_TARGET plain
#define PYPAR_LANES 4
#include "cpu/vocab_rows_kernels.h"
