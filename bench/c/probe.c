/* For Python through ctypes: the latency of one cache line between two cores, and the barrier of the bench programs. */
#include <pthread.h>
#include <sched.h>
#include <stdint.h>
#include <time.h>

static void pause_cpu(void) {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

typedef struct {
  uint32_t* line;
  int core, rounds;
  int failed;
} pong_arg;

static int pin_thread(int core) {
  cpu_set_t set;
  CPU_ZERO(&set);
  CPU_SET(core, &set);
  return pthread_setaffinity_np(pthread_self(), sizeof set, &set);
}

/* Answers 1, 3, 5, ... with 2, 4, 6, ... */
static void* pong(void* p) {
  pong_arg* arg = p;
  arg->failed = pin_thread(arg->core);
  for (uint32_t k = 1; k < 2u * (uint32_t)arg->rounds; k += 2) {
    while (__atomic_load_n(arg->line, __ATOMIC_ACQUIRE) != k) pause_cpu();
    __atomic_store_n(arg->line, k + 1, __ATOMIC_RELEASE);
  }
  return NULL;
}

static void* ping(void* p) {
  pong_arg* arg = p;
  double best = -1;
  arg->failed = pin_thread(arg->core);
  struct timespec a, b;
  int batch = arg->rounds / 20;
  for (int n = 0; n < 20; n++) { /* the fastest of 20 batches: another process on a core spoils some of them */
    clock_gettime(CLOCK_MONOTONIC, &a);
    for (int k = n * batch; k < (n + 1) * batch; k++) {
      __atomic_store_n(arg->line, 2u * (uint32_t)k + 1, __ATOMIC_RELEASE);
      while (__atomic_load_n(arg->line, __ATOMIC_ACQUIRE) != 2u * (uint32_t)k + 2) pause_cpu();
    }
    clock_gettime(CLOCK_MONOTONIC, &b);
    double ns = (1e9 * (double)(b.tv_sec - a.tv_sec) + (double)(b.tv_nsec - a.tv_nsec)) / (2.0 * batch);
    if (best < 0 || ns < best) best = ns;
  }
  *(double*)(arg->line + 32) = best; /* two lines behind the one that bounces */
  return NULL;
}

/* One-way nanoseconds, or -1. rounds: a multiple of 20. */
double line_latency_ns(int core_a, int core_b, int rounds) {
  static _Alignas(128) uint32_t lines[64];
  lines[0] = 0;
  pthread_t a, b;
  pong_arg first = {lines, core_a, rounds, 0}, second = {lines, core_b, rounds, 0};
  if (pthread_create(&b, NULL, pong, &second) != 0) return -1;
  if (pthread_create(&a, NULL, ping, &first) != 0) return -1;
  pthread_join(a, NULL);
  pthread_join(b, NULL);
  return first.failed || second.failed ? -1 : *(double*)(lines + 32);
}

/* counters: one line of 64 bytes per rank. Returns 0, or 1 when a peer did not come within limit_s. */
int bench_barrier(uint32_t* counters, int rank, int world, uint32_t epoch, double limit_s) {
  struct timespec t, start = {0, 0};
  __atomic_store_n(counters + 16 * rank, epoch, __ATOMIC_RELEASE);
  for (int r = 0; r < world; r++)
    for (uint32_t spins = 1; (int32_t)(__atomic_load_n(counters + 16 * r, __ATOMIC_ACQUIRE) - epoch) < 0; spins++) {
      pause_cpu();
      if (spins % 1000 == 0) sched_yield();
      if (spins % 100000 != 0) continue;
      clock_gettime(CLOCK_MONOTONIC, &t);
      if (start.tv_sec == 0) start = t;
      if ((double)(t.tv_sec - start.tv_sec) > limit_s) return 1;
    }
  return 0;
}
