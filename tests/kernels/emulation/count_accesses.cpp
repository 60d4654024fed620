// What g++ -fsanitize=thread calls at every access to memory, in place of ThreadSanitizer's own library: so all loads
// and stores of a kernel are seen, and nothing is written into the kernels for it. This file is compiled without.
//
// Plain arrays here: a template of the standard library that the instrumented file uses, too, might be linked in the
// instrumented form, and count itself.

#include "count_accesses.h"

#include <cstdlib>

namespace emulation {

namespace {

struct Range {
  uintptr_t begin, end;
  Place place;
  bool* is_polled;  // for each 4 bytes: an atomic load has looked there
};

constexpr int kMostRanges = 64;
thread_local Range ranges[kMostRanges];
thread_local int num_ranges = 0;
thread_local Counts sum;

Range* range_of(uintptr_t at) {
  for (int i = 0; i < num_ranges; ++i) {
    if (ranges[i].begin <= at && at < ranges[i].end) return &ranges[i];
  }
  return nullptr;
}

void loaded(const volatile void* from, size_t bytes) {
  const Range* range = range_of(reinterpret_cast<uintptr_t>(from));
  if (range == nullptr) return;
  (range->place == Place::own ? sum.read : sum.from_peers) += static_cast<int64_t>(bytes);
}

void stored(const volatile void* to, size_t bytes) {
  const Range* range = range_of(reinterpret_cast<uintptr_t>(to));
  if (range == nullptr) return;
  (range->place == Place::own ? sum.written : sum.to_peers) += static_cast<int64_t>(bytes);
}

// Who waits looks again and again, how often is chance: a place counts once.
void polled(const volatile void* from, size_t bytes) {
  const uintptr_t at = reinterpret_cast<uintptr_t>(from);
  const Range* range = range_of(at);
  if (range == nullptr || range->is_polled[(at - range->begin) / 4]) return;
  range->is_polled[(at - range->begin) / 4] = true;
  loaded(from, bytes);
}

}  // namespace

void count_in(const void* begin, size_t bytes, Place place) {
  if (num_ranges == kMostRanges) std::abort();
  const uintptr_t at = reinterpret_cast<uintptr_t>(begin);
  ranges[num_ranges++] = {at, at + bytes, place, static_cast<bool*>(std::calloc(bytes / 4 + 1, sizeof(bool)))};
}

Counts counts() {
  return sum;
}

}  // namespace emulation

using emulation::loaded;
using emulation::polled;
using emulation::stored;

extern "C" {

void __tsan_init() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
void __tsan_read_range(void* from, size_t bytes) {
  loaded(from, bytes);
}
void __tsan_write_range(void* to, size_t bytes) {
  stored(to, bytes);
}

#define PLAIN(bytes)                              \
  void __tsan_read##bytes(void* from) {           \
    loaded(from, bytes);                          \
  }                                               \
  void __tsan_write##bytes(void* to) {            \
    stored(to, bytes);                            \
  }                                               \
  void __tsan_unaligned_read##bytes(void* from) { \
    loaded(from, bytes);                          \
  }                                               \
  void __tsan_unaligned_write##bytes(void* to) {  \
    stored(to, bytes);                            \
  }
PLAIN(1)
PLAIN(2)
PLAIN(4)
PLAIN(8)
PLAIN(16)

// The orders are the strongest: what is counted doesn't depend on them.
#define ATOMIC(bits, T)                                                                               \
  T __tsan_atomic##bits##_load(const volatile T* from, int) {                                         \
    polled(from, sizeof(T));                                                                          \
    return __atomic_load_n(from, __ATOMIC_SEQ_CST);                                                   \
  }                                                                                                   \
  void __tsan_atomic##bits##_store(volatile T* to, T value, int) {                                    \
    stored(to, sizeof(T));                                                                            \
    __atomic_store_n(to, value, __ATOMIC_SEQ_CST);                                                    \
  }                                                                                                   \
  T __tsan_atomic##bits##_fetch_add(volatile T* to, T value, int) {                                   \
    stored(to, sizeof(T));                                                                            \
    return __atomic_fetch_add(to, value, __ATOMIC_SEQ_CST);                                           \
  }                                                                                                   \
  int __tsan_atomic##bits##_compare_exchange_strong(volatile T* to, T* before, T value, int, int) {   \
    stored(to, sizeof(T));                                                                            \
    return __atomic_compare_exchange_n(to, before, value, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST); \
  }
ATOMIC(8, uint8_t)
ATOMIC(32, uint32_t)
ATOMIC(64, uint64_t)

// Linked with --wrap=memcpy: the copy engine of pypar/launch.cuh here.
void* __real_memcpy(void* to, const void* from, size_t bytes);
void* __wrap_memcpy(void* to, const void* from, size_t bytes) {
  loaded(from, bytes), stored(to, bytes);
  return __real_memcpy(to, from, bytes);
}

}  // extern "C"
