// Element types, and what a block does with runs of them: copies, and sums over the ranks in rank order.
//
// 16 bytes at a time where every pointer of the run is aligned to that, otherwise one element; the bits are the same.
#pragma once

#include <cstdint>
#include <cstring>

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

namespace pypar {

enum class Reduction : int { sum, avg, product, min, max };

// What a type is summed in: half types in float32.
template <typename T>
struct Element {
  using Wide = T;
  __device__ static T widen(T x) { return x; }
  __device__ static T narrow(T x) { return x; }
};
template <>
struct Element<__nv_bfloat16> {
  using Wide = float;
  __device__ static float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
  __device__ static __nv_bfloat16 narrow(float x) { return __float2bfloat16_rn(x); }
};
template <>
struct Element<__half> {
  using Wide = float;
  __device__ static float widen(__half x) { return __half2float(x); }
  __device__ static __half narrow(float x) { return __float2half_rn(x); }
};

// As csrc/cpu/reduce_kernels.h: of equal numbers the earlier one, a NaN of any rank stays.
template <typename W>
__device__ inline W combine(Reduction op, W a, W b) {
  switch (op) {
    case Reduction::product: return a * b;
    case Reduction::min: return b < a || b != b ? b : a;
    case Reduction::max: return b > a || b != b ? b : a;
    default: return a + b;
  }
}

// The factor of an average, found as on the CPU: 1/W first, then one product.
template <typename W>
__device__ inline W scaled(Reduction op, W sum, int world) {
  return op == Reduction::avg ? sum * (W(1) / static_cast<W>(world)) : sum;
}

template <typename T>
struct Vector {
  static constexpr int kNum = 16 / sizeof(T);
  T at[kNum];
};

template <typename T>
__device__ inline Vector<T> load_vector(const T* from) {
  const uint4 raw = *reinterpret_cast<const uint4*>(from);
  Vector<T> x;
  memcpy(static_cast<void*>(x.at), &raw, 16);
  return x;
}

// Through the intrinsic: of a plain store of what was copied together, the compiler makes up to four smaller ones.
template <typename T>
__device__ inline void store_vector(T* to, const Vector<T>& x) {
  uint4 raw;
  memcpy(&raw, static_cast<const void*>(x.at), 16);
  __stwb(reinterpret_cast<uint4*>(to), raw);
}

__device__ inline bool aligned16(const void* pointer) {
  return reinterpret_cast<uintptr_t>(pointer) % 16 == 0;
}

// A run of elements, [begin, begin + num).
struct Run {
  int64_t begin, num;
};

// Part `part` of `parts` of [0, n), cut where 16 bytes begin.
template <typename T>
__host__ __device__ inline Run part_of(int64_t n, int part, int parts) {
  constexpr int64_t kNum = Vector<T>::kNum;
  const int64_t vectors = (n + kNum - 1) / kNum;
  const int64_t each = (vectors + parts - 1) / parts * kNum;
  const int64_t begin = each * part < n ? each * part : n;
  return {begin, n - begin < each ? n - begin : each};
}

// Of a block: to[0..n) = from[0..n).
template <typename T>
__device__ inline void copy_run(T* to, const T* from, int64_t n) {
  constexpr int64_t kNum = Vector<T>::kNum;
  int64_t done = 0;
  if (aligned16(to) && aligned16(from)) {
    done = n / kNum * kNum;
    for (int64_t i = threadIdx.x * kNum; i < done; i += blockDim.x * kNum) store_vector(to + i, load_vector(from + i));
  }
  for (int64_t i = done + threadIdx.x; i < n; i += blockDim.x) to[i] = from[i];
}

// Where the pieces of all ranks lie: this rank's own, and those of the others at a stride in its slot.
template <typename T>
struct Sources {
  const T* own;
  const T* slot;
  int64_t stride;
  int rank, world;

  __device__ const T* of(int r) const { return r == rank ? own : slot + r * stride; }
};

template <typename T>
__device__ inline typename Element<T>::Wide reduce_one(const Sources<T>& sources, int64_t i, Reduction op) {
  auto sum = Element<T>::widen(sources.of(0)[i]);
  for (int r = 1; r < sources.world; ++r) sum = combine(op, sum, Element<T>::widen(sources.of(r)[i]));
  return sum;
}

// Of a block: for each i of [0, n) the numbers of ranks 0, 1, ... are combined in this order, in Element<T>::Wide, and
// given to sink(i, wide) or, `kNum` at a time, to sink.vector(i, wide[kNum]). `vectors`: the sink's pointers are
// aligned.
template <typename T, typename Sink>
__device__ inline void reduce_run(const Sources<T>& sources, int64_t n, Reduction op, bool vectors, Sink& sink) {
  using Wide = typename Element<T>::Wide;
  constexpr int64_t kNum = Vector<T>::kNum;
  int64_t done = 0;
  if (vectors && aligned16(sources.own) && aligned16(sources.slot) && sources.stride % kNum == 0) {
    done = n / kNum * kNum;
    for (int64_t i = threadIdx.x * kNum; i < done; i += blockDim.x * kNum) {
      Wide sum[kNum];
      Vector<T> x = load_vector(sources.of(0) + i);
#pragma unroll
      for (int k = 0; k < kNum; ++k) sum[k] = Element<T>::widen(x.at[k]);
      for (int r = 1; r < sources.world; ++r) {
        x = load_vector(sources.of(r) + i);
#pragma unroll
        for (int k = 0; k < kNum; ++k) sum[k] = combine(op, sum[k], Element<T>::widen(x.at[k]));
      }
      sink.vector(i, sum);
    }
  }
  for (int64_t i = done + threadIdx.x; i < n; i += blockDim.x) sink.one(i, reduce_one(sources, i, op));
}

}  // namespace pypar
