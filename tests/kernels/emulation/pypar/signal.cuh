// The host twin of csrc/include/pypar/signal.cuh: the same names with the same meaning, on std::atomic_ref.
//
// PYPAR_EMULATION_STALLS=seed:most_us makes threads sleep now and then before they publish and after they have waited.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>

#include <cuda_runtime.h>

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

}  // namespace pypar
