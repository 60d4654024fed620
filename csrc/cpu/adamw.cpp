#include "cpu/adamw.h"

#include <string_view>

#include "cpu/reduce.h"

namespace pypar {

#define PYPAR_DECLARE(target)                                                                                  \
  namespace target {                                                                                           \
  void adamw(float* p, const float* g, float* m, float* v, float* v_max, void* low, DType low_type, int64_t n, \
             const AdamW& how);                                                                                \
  }
PYPAR_DECLARE(plain)
#if defined(__x86_64__)
PYPAR_DECLARE(avx2)
PYPAR_DECLARE(avx512)
#endif

namespace {

decltype(&plain::adamw) choose() {
#if defined(__x86_64__)
  const std::string_view capability = cpu_capability();
  if (capability == "avx512") return avx512::adamw;
  if (capability == "avx2") return avx2::adamw;
#endif
  return plain::adamw;
}

}  // namespace

void adamw(float* p, const float* g, float* m, float* v, float* v_max, void* low, DType low_type, int64_t n,
           const AdamW& how) {
  static const auto kernel = choose();
  kernel(p, g, m, v, v_max, low, low_type, n, how);
}

}  // namespace pypar
