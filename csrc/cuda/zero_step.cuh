// The gradients of all ranks for my shard, summed in rank order in float32, unscaled, clipped, through AdamW, cast, and
// stored where the parameters are used: each number of the shard is read and written once.
#pragma once

#include "cuda/channel.cuh"
#include "cuda/elements.cuh"
#include "cuda/reduce_scatter.cuh"

namespace pypar {

// As in csrc/cpu/adamw.h, which says whose formula it is and in which order; found on the host in float64.
struct AdamWFactors {
  float keep, weight_decay, beta2, eps, rest1, rest2, step_size, correction2_sqrt, grad_scale;
  bool is_decoupled, maximize;
};

struct ZeroStepParams {
  float *param, *exp_avg, *exp_avg_sq, *max_exp_avg_sq;  // [cuts.num(rank)]; no maximum: not amsgrad
  const void* grad;                                      // [cuts.begin[world]] of every rank
  void* low;                                             // null, or param once more in its type of grad
  const float* clip;  // null, or one more factor of the gradient, which an earlier kernel found
  Cuts cuts;
  AdamWFactors factors;
  Channel channel;
};

// The new weight. Operations that no compiler contracts: the bits of the CPU.
__device__ inline float adamw_one(const AdamWFactors& how, float scale, float sum, float param, float& exp_avg,
                                  float& exp_avg_sq, float& max_exp_avg_sq, bool is_amsgrad) {
  float grad = __fmul_rn(sum, scale), weight = param;
  if (how.is_decoupled) {
    weight = __fmul_rn(weight, how.keep);
  } else {
    grad = __fadd_rn(grad, __fmul_rn(weight, how.weight_decay));
  }
  exp_avg = __fadd_rn(exp_avg, __fmul_rn(__fsub_rn(grad, exp_avg), how.rest1));
  exp_avg_sq = __fadd_rn(__fmul_rn(exp_avg_sq, how.beta2), __fmul_rn(__fmul_rn(grad, grad), how.rest2));
  float second = exp_avg_sq;
  if (is_amsgrad) {
    if (max_exp_avg_sq > second) second = max_exp_avg_sq;
    max_exp_avg_sq = second;
  }
  const float denominator = __fadd_rn(__fdiv_rn(__fsqrt_rn(second), how.correction2_sqrt), how.eps);
  return __fsub_rn(weight, __fmul_rn(__fdiv_rn(exp_avg, denominator), how.step_size));
}

// The gradient's factor: unscale, clip, and the sign of maximizing.
__device__ inline float gradient_scale(const ZeroStepParams& p) {
  const float scale = p.factors.maximize ? -p.factors.grad_scale : p.factors.grad_scale;
  return p.clip == nullptr ? scale : __fmul_rn(scale, *p.clip);
}

template <typename T>
struct ToParameters {
  const ZeroStepParams& p;
  float scale;
  int64_t at;  // of the run in the shard

  __device__ void one(int64_t i, float sum) {
    const int64_t j = at + i;
    const bool is_amsgrad = p.max_exp_avg_sq != nullptr;
    float m = p.exp_avg[j], v = p.exp_avg_sq[j], v_max = is_amsgrad ? p.max_exp_avg_sq[j] : 0;
    const float w = adamw_one(p.factors, scale, sum, p.param[j], m, v, v_max, is_amsgrad);
    p.param[j] = w, p.exp_avg[j] = m, p.exp_avg_sq[j] = v;
    if (is_amsgrad) p.max_exp_avg_sq[j] = v_max;
    if (p.low != nullptr) static_cast<T*>(p.low)[j] = Element<T>::narrow(w);
  }
  __device__ void vector(int64_t i, const float* sum) {
    Vector<T> low;
#pragma unroll
    for (int k = 0; k < Vector<T>::kNum; k += 4) {
      const int64_t j = at + i + k;
      Vector<float> w = load_vector(p.param + j), m = load_vector(p.exp_avg + j), v = load_vector(p.exp_avg_sq + j);
      const bool is_amsgrad = p.max_exp_avg_sq != nullptr;
      Vector<float> v_max{};
      if (is_amsgrad) v_max = load_vector(p.max_exp_avg_sq + j);
#pragma unroll
      for (int q = 0; q < 4; ++q) {
        w.at[q] = adamw_one(p.factors, scale, sum[k + q], w.at[q], m.at[q], v.at[q], v_max.at[q], is_amsgrad);
        low.at[k + q] = Element<T>::narrow(w.at[q]);
      }
      store_vector(p.param + j, w), store_vector(p.exp_avg + j, m), store_vector(p.exp_avg_sq + j, v);
      if (is_amsgrad) store_vector(p.max_exp_avg_sq + j, v_max);
    }
    if (p.low != nullptr) store_vector(static_cast<T*>(p.low) + at + i, low);
  }
};

template <typename T>
__global__ void zero_step_kernel(const __grid_constant__ ZeroStepParams p) {
  const uint32_t call = this_call(p.channel);
  const T* grad = static_cast<const T*>(p.grad);
  const Run run = part_of<T>(p.cuts.num(p.channel.rank), static_cast<int>(blockIdx.x), gridDim.x);
  exchange_shards(p.channel, grad, p.cuts, call);
  // A run begins where 16 bytes of the shard do; null is aligned.
  const bool vectors = aligned16(p.param) && aligned16(p.exp_avg) && aligned16(p.exp_avg_sq) &&
                       aligned16(p.max_exp_avg_sq) && aligned16(p.low);
  ToParameters<T> sink{p, gradient_scale(p), run.begin};
  reduce_run(shard_sources(p.channel, grad, p.cuts, run, call), run.num, Reduction::sum, vectors, sink);
  finish(p.channel, call);
}

}  // namespace pypar
