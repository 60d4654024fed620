#include "cpu/adamw.h"

#define PYPAR_TARGET plain
#define PYPAR_LANES 4
#define PYPAR_SQRT sqrt_of

namespace {

using Four = float __attribute__((vector_size(16)));
inline Four sqrt_of(Four x) {
  for (int i = 0; i < 4; ++i) x[i] = __builtin_sqrtf(x[i]);
  return x;
}

}  // namespace

#include "cpu/adamw_kernels.h"
