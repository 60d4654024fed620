// The host twin of csrc/include/pypar/signal.cuh: the same names with the same meaning, on std::atomic_ref.
//
// PYPAR_EMULATION_STALLS=seed:most_us makes threads sleep now and then before they publish and after they have waited.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstring>
#include <vector>

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "multicast.h"
#include "stalls.h"

namespace pypar {

template <typename T>
std::atomic_ref<T> atomic(const T* word) {
  return std::atomic_ref<T>(*const_cast<T*>(word));
}

inline void store_release_sys(uint32_t* word, uint32_t value) {
  emulation::stall(4);
  atomic(word).store(value, std::memory_order_release);
}

inline uint32_t load_relaxed_sys(const uint32_t* word) {
  return atomic(word).load(std::memory_order_relaxed);
}

// ThreadSanitizer knows no fences; one more look at the word that was polled orders the same.
inline void acquire(const uint32_t* word) {
  (void)atomic(word).load(std::memory_order_acquire);
  emulation::stall(4);
}

inline uint32_t add_acq_rel_gpu(uint32_t* word, uint32_t value) {
  emulation::stall(4);
  return atomic(word).fetch_add(value, std::memory_order_acq_rel);
}

inline uint32_t set_once_gpu(uint32_t* word, uint32_t value) {
  uint32_t before = 0;
  atomic(word).compare_exchange_strong(before, value, std::memory_order_relaxed);
  return before;
}

inline void store_pair_sys(uint64_t* pair, uint32_t data, uint32_t call) {
  emulation::stall(256);  // there are many
  atomic(pair).store(static_cast<uint64_t>(call) << 32 | data, std::memory_order_relaxed);
}

inline uint64_t load_pair_sys(const uint64_t* pair) {
  return atomic(pair).load(std::memory_order_relaxed);
}

inline uint64_t global_time_ns() {
  return static_cast<uint64_t>(std::chrono::steady_clock::now().time_since_epoch() / std::chrono::nanoseconds(1));
}

inline void nap() {
  emulation::rest();
}
inline void fence_sys() {}
inline void trap() {
  emulation::trap();
}

// From the last rank down, which is an order, and not that of the ranks.
template <typename T, typename Widen, typename Narrow>
uint4 add_down(const T* multicast, Widen widen, Narrow narrow) {
  constexpr size_t kNum = 16 / sizeof(T);
  emulation::stall(256);
  float sums[kNum] = {};
  const std::vector<char*> places = emulation::places_of(multicast);
  for (size_t r = places.size(); r-- > 0;) {
    const T* x = reinterpret_cast<const T*>(places[r]);
    for (size_t k = 0; k < kNum; ++k) sums[k] = r + 1 == places.size() ? widen(x[k]) : sums[k] + widen(x[k]);
  }
  T narrowed[kNum];
  for (size_t k = 0; k < kNum; ++k) narrowed[k] = narrow(sums[k]);
  uint4 sum;
  std::memcpy(&sum, narrowed, 16);
  return sum;
}

inline uint4 multimem_add(const float* multicast) {
  return add_down(multicast, [](float x) { return x; }, [](float x) { return x; });
}
inline uint4 multimem_add(const __nv_bfloat16* multicast) {
  return add_down(multicast, __bfloat162float, __float2bfloat16_rn);
}
inline uint4 multimem_add(const __half* multicast) {
  return add_down(multicast, __half2float, __float2half_rn);
}

inline void multimem_store(void* multicast, const uint4& x) {
  emulation::stall(256);
  for (char* place : emulation::places_of(multicast)) *reinterpret_cast<uint4*>(place) = x;
}

}  // namespace pypar
