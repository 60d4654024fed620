// The kernel behind adamw.h, compiled once per instruction set as those of reduce_kernels.h. PYPAR_LANES: float32 in a
// vector of the target; PYPAR_SQRT: their square roots. Products and sums are not contracted, so that every target
// gives the same bits.

#pragma GCC optimize("fp-contract=off")

#include "cpu/half_kernels.h"

namespace pypar::PYPAR_TARGET {

namespace {

constexpr int64_t kBlock = 1024;  // weights that stay in L1 until they are narrowed
constexpr int64_t kLanes = PYPAR_LANES;
using Vector = float __attribute__((vector_size(4 * kLanes)));
using Loose = float __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));

inline Vector load(const float* from) {
  return *reinterpret_cast<const Loose*>(from);
}
inline void store(float* to, const Vector& x) {
  *reinterpret_cast<Loose*>(to) = x;
}

struct Run {
  float *p, *m, *v, *v_max;
  const float* g;
};

template <bool kDecoupled, bool kAmsgrad>
inline void step_vector(const Run& run, int64_t i, const AdamW& how) {
  Vector grad = load(run.g + i) * how.grad_scale, weight = load(run.p + i);
  if (kDecoupled) {
    weight = weight * how.keep;
  } else {
    grad = grad + weight * how.weight_decay;
  }
  Vector first = load(run.m + i), second = load(run.v + i);
  first = first + (grad - first) * how.rest1;
  second = second * how.beta2 + grad * grad * how.rest2;
  store(run.m + i, first);
  store(run.v + i, second);
  if (kAmsgrad) {
    const Vector before = load(run.v_max + i);
    second = before > second ? before : second;
    store(run.v_max + i, second);
  }
  store(run.p + i, weight - first / (PYPAR_SQRT(second) / how.correction2_sqrt + how.eps) * how.step_size);
}

template <bool kDecoupled, bool kAmsgrad>
void step_block(const Run& run, int64_t begin, int64_t n, const AdamW& how) {
  int64_t i = begin;
  for (; i + kLanes <= begin + n; i += kLanes) step_vector<kDecoupled, kAmsgrad>(run, i, how);
  const int64_t rest = begin + n - i;
  if (rest == 0) return;
  // The same arithmetic on a vector that is only partly the caller's.
  float lanes[5][kLanes] = {};
  Run part{lanes[0], lanes[1], lanes[2], lanes[3], lanes[4]};
  for (int64_t k = 0; k < rest; ++k) {
    lanes[0][k] = run.p[i + k], lanes[1][k] = run.m[i + k], lanes[2][k] = run.v[i + k], lanes[4][k] = run.g[i + k];
    if (kAmsgrad) lanes[3][k] = run.v_max[i + k];
  }
  step_vector<kDecoupled, kAmsgrad>(part, 0, how);
  for (int64_t k = 0; k < rest; ++k) {
    run.p[i + k] = lanes[0][k], run.m[i + k] = lanes[1][k], run.v[i + k] = lanes[2][k];
    if (kAmsgrad) run.v_max[i + k] = lanes[3][k];
  }
}

}  // namespace

void adamw(float* p, const float* g, float* m, float* v, float* v_max, void* low, DType low_type, int64_t n,
           const AdamW& how) {
  AdamW with_sign = how;
  if (how.maximize) with_sign.grad_scale = -how.grad_scale;
  const Run run{p, m, v, v_max, g};
  const auto block = how.is_decoupled ? (v_max != nullptr ? step_block<true, true> : step_block<true, false>)
                                      : (v_max != nullptr ? step_block<false, true> : step_block<false, false>);
  for (int64_t at = 0; at < n; at += kBlock) {
    const int64_t count = n - at < kBlock ? n - at : kBlock;
    block(run, at, count, with_sign);
    if (low != nullptr && low_type == DType::bf16) {
      Bf16* out = static_cast<Bf16*>(low) + at;
      for (int64_t i = 0; i < count; ++i) out[i] = narrow_bf16(p[at + i]);
    } else if (low != nullptr) {
      F16* out = static_cast<F16*>(low) + at;
      for (int64_t i = 0; i < count; ++i) out[i] = narrow_f16(p[at + i]);
    }
  }
}

}  // namespace pypar::PYPAR_TARGET
