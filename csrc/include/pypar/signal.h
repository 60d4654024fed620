// Signals between ranks on one host: a counter that only grows, in memory that every rank maps.
//
// One writer per signal; its value is an epoch, compared modulo 2^32, never reset (an ABA window would open).
// notify() publishes with release and wakes sleepers only if one announced itself; a waiter spins briefly, then
// announces itself and sleeps in futex. The announcement and the value form a Dekker pair, hence the seq_cst on both.
#pragma once

#include <atomic>
#include <cstdint>
#include <ctime>

#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace pypar {

inline constexpr int kCacheLineBytes = 64;

inline void cpu_relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

inline bool reached(uint32_t value, uint32_t target) {
  return static_cast<int32_t>(value - target) >= 0;
}

inline uint32_t load_acquire(const uint32_t& word) {
  return std::atomic_ref<uint32_t>(const_cast<uint32_t&>(word)).load(std::memory_order_acquire);
}

inline uint64_t now_ns() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return static_cast<uint64_t>(t.tv_sec) * 1000000000ull + static_cast<uint64_t>(t.tv_nsec);
}

// Sleeps until `word` differs from `seen` or `slice_ns` passed. Spurious returns are allowed.
inline void futex_sleep(uint32_t& word, uint32_t seen, uint64_t slice_ns) {
  timespec slice{static_cast<time_t>(slice_ns / 1000000000ull), static_cast<long>(slice_ns % 1000000000ull)};
  syscall(SYS_futex, &word, FUTEX_WAIT, seen, &slice, nullptr, 0);
}

inline void futex_wake_all(uint32_t& word) {
  syscall(SYS_futex, &word, FUTEX_WAKE, 0x7fffffff, nullptr, nullptr, 0);
}

// Publishes `value` in `word`. `sleepers`: how many waiters announced themselves at this writer's signals.
inline void notify(uint32_t& word, uint32_t value, uint32_t& sleepers) {
  std::atomic_ref<uint32_t>(word).exchange(value, std::memory_order_seq_cst);
  if (std::atomic_ref<uint32_t>(sleepers).load(std::memory_order_seq_cst) != 0) {
    futex_wake_all(word);
  }
}

// Waits until `word` reached `target`. `check()` is called about every slice while asleep and ends the wait by throwing
// (deadline, dead peer, abort). `spin_ns` of 0 sleeps at once: right when ranks outnumber cores.
template <typename Check>
void wait_signal(uint32_t& word, uint32_t target, uint32_t& sleepers, uint64_t spin_ns, Check&& check) {
  if (reached(load_acquire(word), target)) return;
  if (spin_ns != 0) {
    const uint64_t end = now_ns() + spin_ns;
    do {
      for (int i = 0; i < 64; ++i) {
        cpu_relax();
        if (reached(load_acquire(word), target)) return;
      }
    } while (now_ns() < end);
  }
  struct Announced {
    std::atomic_ref<uint32_t> count;
    explicit Announced(uint32_t& c) : count(c) { count.fetch_add(1, std::memory_order_seq_cst); }
    ~Announced() { count.fetch_sub(1, std::memory_order_seq_cst); }
  } announced(sleepers);
  constexpr uint64_t kSliceNs = 20'000'000;  // how late a dead peer or an abort is noticed
  for (;;) {
    const uint32_t seen = std::atomic_ref<uint32_t>(word).load(std::memory_order_seq_cst);
    if (reached(seen, target)) return;
    futex_sleep(word, seen, kSliceNs);
    if (reached(load_acquire(word), target)) return;
    check();
  }
}

}  // namespace pypar
