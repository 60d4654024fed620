// Signals between GPUs: every access to memory that has an order or a scope, and the only PTX of the CUDA kernels.
//
// tests/kernels/emulation/pypar/signal.cuh is its twin on std::atomic_ref: same names, same meaning. The protocol that
// is built on these is csrc/cuda/channel.cuh; docs/gpu_kernels.md explains it.
#pragma once

#include <cstdint>
#include <type_traits>

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

namespace pypar {

// Publishes: all that this thread has stored, or has seen stored before a barrier of its block, is visible to whoever
// acquires the value, on any GPU. One writer per word.
__device__ __forceinline__ void store_release_sys(uint32_t* word, uint32_t value) {
  asm volatile("st.release.sys.global.u32 [%0], %1;" ::"l"(word), "r"(value) : "memory");
}

// A look without an order: poll with this, then acquire().
__device__ __forceinline__ uint32_t load_relaxed_sys(const uint32_t* word) {
  uint32_t value;
  asm volatile("ld.relaxed.sys.global.u32 %0, [%1];" : "=r"(value) : "l"(word) : "memory");
  return value;
}

// After a poll of `word` that found what it waited for: what was published with that value can be read. The fence is
// for the whole thread; the word is named for readers, and for the twin.
__device__ __forceinline__ void acquire(const uint32_t* /*word*/) {
  asm volatile("fence.acq_rel.sys;" ::: "memory");
}

// Counts blocks of this GPU that are over: each sees what those before it have done. Returns the value before.
__device__ __forceinline__ uint32_t add_acq_rel_gpu(uint32_t* word, uint32_t value) {
  uint32_t before;
  asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], %2;" : "=r"(before) : "l"(word), "r"(value) : "memory");
  return before;
}

// Sets a word of this GPU that is 0; returns what was there.
__device__ __forceinline__ uint32_t set_once_gpu(uint32_t* word, uint32_t value) {
  uint32_t before;
  asm volatile("atom.relaxed.gpu.global.cas.b32 %0, [%1], 0, %2;" : "=r"(before) : "l"(word), "r"(value) : "memory");
  return before;
}

// 4 bytes of data and the number of their call in one word of 8: the number needs no flag, and no order, of its own.
// One access of 64 bits, not a vector of two: the memory model takes the parts of a vector for separate accesses.
__device__ __forceinline__ void store_pair_sys(uint64_t* pair, uint32_t data, uint32_t call) {
  const uint64_t both = static_cast<uint64_t>(call) << 32 | data;
  asm volatile("st.relaxed.sys.global.u64 [%0], %1;" ::"l"(pair), "l"(both) : "memory");
}

__device__ __forceinline__ uint64_t load_pair_sys(const uint64_t* pair) {
  uint64_t both;
  asm volatile("ld.relaxed.sys.global.u64 %0, [%1];" : "=l"(both) : "l"(pair) : "memory");
  return both;
}

__device__ __forceinline__ uint64_t global_time_ns() {
  uint64_t now;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
  return now;
}

// Between two looks: leaves the memory system to those that have work.
__device__ __forceinline__ void nap() {
  __nanosleep(32);
}

// Before trap(): what was written about the error reaches the host and the peers.
__device__ __forceinline__ void fence_sys() {
  asm volatile("fence.acq_rel.sys;" ::: "memory");
}

// Ends the kernel with an error of the device: whatever is queued behind it does not run on stale data.
__device__ __forceinline__ void trap() {
  asm volatile("trap;");
}

// NVLink SHARP. A multicast address stands for the same place in every rank's memory, and only these two may take it. A
// switch adds 16 bytes of numbers, in an order of its own: halves in float32, rounded once. Relaxed: flags order it, as
// they do other data. Needs sm_90; earlier GPUs have no such address.
template <typename T>
__device__ __forceinline__ uint4 multimem_add(const T* multicast) {
  uint4 sum{};
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
  trap();
#else
  if constexpr (std::is_same_v<T, float>) {
    asm volatile("multimem.ld_reduce.relaxed.sys.global.add.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(sum.x), "=r"(sum.y), "=r"(sum.z), "=r"(sum.w)
                 : "l"(multicast)
                 : "memory");
  } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    asm volatile("multimem.ld_reduce.relaxed.sys.global.add.acc::f32.v4.bf16x2 {%0, %1, %2, %3}, [%4];"
                 : "=r"(sum.x), "=r"(sum.y), "=r"(sum.z), "=r"(sum.w)
                 : "l"(multicast)
                 : "memory");
  } else {
    static_assert(std::is_same_v<T, __half>);
    asm volatile("multimem.ld_reduce.relaxed.sys.global.add.acc::f32.v4.f16x2 {%0, %1, %2, %3}, [%4];"
                 : "=r"(sum.x), "=r"(sum.y), "=r"(sum.z), "=r"(sum.w)
                 : "l"(multicast)
                 : "memory");
  }
#endif
  return sum;
}

// 16 bytes to every rank.
__device__ __forceinline__ void multimem_store(void* multicast, const uint4& x) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
  trap();
#else
  asm volatile("multimem.st.relaxed.sys.global.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(multicast), "r"(x.x), "r"(x.y),
               "r"(x.z), "r"(x.w)
               : "memory");
#endif
}

}  // namespace pypar
