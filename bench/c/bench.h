/* What every bench program shares: a control page, a barrier, verification and the clock.
 *
 * W processes map one control page. Rank 0 reads commands from stdin and answers each with one JSON line on stdout:
 *   verify <op> <bytes>                      {"error": ""} or {"error": "rank 1: ..."}
 *   time <op> <bytes> <iters> <samples>      {"us": [...], "choice": "..."}: per op, the slowest rank's
 *   tune <op> <bytes>                        {"configs": {"name": us, ...}}; the fastest is kept for verify and time
 *   quit
 * <bytes> is the full tensor: the input of reduce_scatter and all_to_all, the output of all_gather. The idle ranks
 * sleep on a futex, and the harness stops the processes of every program that is not being timed. Compiles as C11 and
 * as C++17.
 */
#ifndef PYPAR_BENCH_H
#define PYPAR_BENCH_H
#include <fcntl.h>
#include <linux/futex.h>
#include <sched.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

enum { kMaxRanks = 16, kMaxSamples = 1024, kMaxConfigs = 32, kLine = 64, kSpins = 20000 };
enum op { kAllReduce, kAllReduceOut, kReduceScatter, kAllGather, kAllToAll, kBroadcast, kSend, kNumOps };
static const char* const kOpNames[kNumOps] = {
    "all_reduce", "all_reduce_out", "reduce_scatter", "all_gather", "all_to_all", "broadcast", "send"};
/* From here on each op is timed alone, on a buffer its rank has just rewritten; below, back to back. */
static const size_t kAloneBytes = 64 << 10;
static const double kLimit_s = 120.0;

typedef struct {
  uint32_t value;
  char pad[kLine - 4];
} counter;

typedef struct {
  counter command_seq; /* futex: rank 0 rings, the others sleep here */
  counter arrived[kMaxRanks];
  char verb[16];
  int op;
  size_t bytes;
  int iters, num_samples, config;
  int pids[kMaxRanks];
  char address[1024]; /* for a program that must tell its peers something before it starts */
  counter address_there;
  char choice[64];
  char error[kMaxRanks][160];
  double us[kMaxRanks][kMaxSamples];
} control_page;

typedef struct {
  int rank, world;
  size_t max_bytes;
  float *in, *out; /* max_bytes each; in place: in */
  control_page* control;
  uint32_t epoch;
  int cores;
  int yield; /* more ranks than cores: give the core away in every wait */
} context;

static context ctx;

/* What a program provides. */
static void program_setup(int argc, char** argv);          /* sets in, out (MPI: starts it) */
static void program_run(enum op op, size_t num, int root); /* num floats of the full tensor */
static int program_num_configs(enum op op, size_t bytes);  /* at least 1 */
static void program_use_config(enum op op, size_t bytes, int config, char* name, size_t size);
static int program_has(enum op op);
static void program_end(void);

static double now_us(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return 1e6 * (double)t.tv_sec + 1e-3 * (double)t.tv_nsec;
}

static void die(const char* what) {
  fprintf(stderr, "bench program, rank %d: %s\n", ctx.rank, what);
  exit(3);
}

static inline void cpu_pause(void) {
#if defined(__x86_64__)
  _mm_pause();
#endif
}

/* Waits until *flag, a counter that only grows, has reached value. */
static inline void wait_for(const uint32_t* flag, uint32_t value) {
  double deadline = 0;
  for (uint32_t spins = 1; (int32_t)(__atomic_load_n(flag, __ATOMIC_ACQUIRE) - value) < 0; spins++) {
    cpu_pause();
    if (ctx.yield ? spins % 64 == 0 : spins % kSpins == 0) {
      sched_yield();
      if (spins % kSpins == 0) {
        if (deadline == 0) deadline = now_us() + 1e6 * kLimit_s;
        if (now_us() > deadline) die("a wait ran past its limit: a peer is gone");
      }
    }
  }
}

static inline void notify(uint32_t* flag, uint32_t value) {
  __atomic_store_n(flag, value, __ATOMIC_RELEASE);
}

static void barrier_on(counter* arrived) {
  ctx.epoch++;
  notify(&arrived[ctx.rank].value, ctx.epoch);
  for (int r = 0; r < ctx.world; r++) wait_for(&arrived[r].value, ctx.epoch);
}

static void barrier(void) {
  barrier_on(ctx.control->arrived);
}

static void pin(int rank) {
  cpu_set_t all, one;
  CPU_ZERO(&one);
  if (sched_getaffinity(0, sizeof all, &all) != 0) return;
  int skip = rank % CPU_COUNT(&all);
  for (int c = 0; c < CPU_SETSIZE; c++)
    if (CPU_ISSET(c, &all) && skip-- == 0) CPU_SET(c, &one);
  sched_setaffinity(0, sizeof one, &one);
}

static inline float* private_buffer(size_t bytes) {
  float* p = (float*)aligned_alloc(4096, (bytes + 4095) / 4096 * 4096);
  if (p == NULL) die("out of memory");
  memset(p, 1, bytes);
  return p;
}

#include "measure.h"

static void answer(void) {
  control_page* c = ctx.control;
  fputs("{", stdout);
  if (strcmp(c->verb, "verify") == 0) {
    const char* error = "";
    for (int r = 0; r < ctx.world; r++) error = c->error[r][0] ? c->error[r] : error;
    printf("\"error\": \"%s\"", error);
  } else {
    printf("\"choice\": \"%s\", \"us\": [", c->choice);
    for (int s = 0; s < c->num_samples; s++) printf("%s%.4f", s ? ", " : "", slowest(s));
    fputs("]", stdout);
  }
  puts("}");
}

/* Rank 0: reads the next command into the control page and rings. Others: sleep until it does. */
static void next_command(uint32_t seen) {
  control_page* c = ctx.control;
  if (ctx.rank != 0) {
    while (__atomic_load_n(&c->command_seq.value, __ATOMIC_ACQUIRE) == seen)
      syscall(SYS_futex, &c->command_seq.value, FUTEX_WAIT, seen, NULL, NULL, 0);
    return;
  }
  char line[160], op_name[32] = "";
  unsigned long bytes = 0;
  c->iters = c->num_samples = 1;
  c->op = kNumOps;
  if (fgets(line, sizeof line, stdin) == NULL ||
      sscanf(line, "%15s %31s %lu %d %d", c->verb, op_name, &bytes, &c->iters, &c->num_samples) < 1)
    strcpy(c->verb, "quit");
  for (int k = 0; k < kNumOps; k++)
    if (strcmp(op_name, kOpNames[k]) == 0) c->op = k;
  c->bytes = bytes;
  if (c->num_samples > kMaxSamples) c->num_samples = kMaxSamples;
  __atomic_store_n(&c->command_seq.value, seen + 1, __ATOMIC_RELEASE);
  syscall(SYS_futex, &c->command_seq.value, FUTEX_WAKE, kMaxRanks, NULL, NULL, 0);
}

static void serve(void) {
  control_page* c = ctx.control;
  if (ctx.rank == 0) {
    printf("{\"pids\": [%d", c->pids[0]);
    for (int r = 1; r < ctx.world; r++) printf(", %d", c->pids[r]);
    puts("]}");
    fflush(stdout);
  }
  for (uint32_t seen = 0;; seen++) {
    next_command(seen);
    enum op op = (enum op)c->op;
    size_t bytes = c->bytes;
    int iters = c->iters, num_samples = c->num_samples;
    char verb[sizeof c->verb];
    memcpy(verb, c->verb, sizeof verb);
    barrier(); /* everybody has read the command: rank 0 may read the next one when this is done */
    if (strcmp(verb, "quit") == 0) return;
    int offered = op != kNumOps && program_has(op) && (op != kSend || ctx.world % 2 == 0);
    if (!offered || bytes > ctx.max_bytes || bytes % (4 * (size_t)ctx.world) != 0) {
      if (ctx.rank == 0) printf("{\"error\": \"not offered: op %d, %zu bytes\"}\n", (int)op, bytes);
    } else {
      int again = strcmp(verb, "tune") == 0;
      choose(op, bytes, again);
      if (strcmp(verb, "verify") == 0) verify(op, bytes);
      if (strcmp(verb, "time") == 0) measure(op, bytes, iters, num_samples);
      if (ctx.rank == 0 && !again) answer();
    }
    fflush(stdout);
  }
}

static void* map_shared(const char* path, size_t bytes) {
  int fd = open(path, O_RDWR);
  if (fd < 0) die("can't open the shared page that the harness made");
  void* p = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  close(fd);
  if (p == MAP_FAILED) die("can't map the shared page");
  return p;
}

/* argv: control path, max bytes, then what the program wants. program_setup sets rank and world. */
int main(int argc, char** argv) {
  if (argc < 3) return fprintf(stderr, "started by the bench harness only\n"), 2;
  ctx.max_bytes = strtoull(argv[2], NULL, 10);
  ctx.control = (control_page*)map_shared(argv[1], sizeof(control_page));
  cpu_set_t all;
  ctx.cores = sched_getaffinity(0, sizeof all, &all) == 0 ? CPU_COUNT(&all) : 1;
  program_setup(argc, argv);
  ctx.yield = ctx.cores < ctx.world;
  ctx.control->pids[ctx.rank] = (int)getpid();
  barrier();
  serve();
  program_end();
  return 0;
}
#endif
