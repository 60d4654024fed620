// One AdamW step of a run of parameters: each number is read and written once.
#pragma once

#include <cstdint>

#include "comm/types.h"

namespace pypar {

// Of Loshchilov and Hutter, Decoupled Weight Decay Regularization (2019), with the order of operations of
// torch.optim.AdamW; is_decoupled false: torch.optim.Adam, whose decay is added to the gradient.
struct AdamW {
  float keep;  // 1 - lr * weight_decay, found in float64 as the others that come of a subtraction
  float weight_decay, beta2, eps;
  float rest1, rest2;      // 1 - beta1, 1 - beta2
  float step_size;         // lr / (1 - beta1^step)
  float correction2_sqrt;  // sqrt(1 - beta2^step)
  float grad_scale;        // the gradient is multiplied by this first: unscale and clip in one
  bool is_decoupled, maximize;
};

// n float32 numbers of the weights p, the gradient g and the moments m and v, of which v's running maximum is kept in
// v_max (null: not amsgrad). low: null, or the weights again in low_type (bf16 or f16), which computing uses.
void adamw(float* p, const float* g, float* m, float* v, float* v_max, void* low, DType low_type, int64_t n,
           const AdamW& how);

}  // namespace pypar
