/* Collectives on tensors that every rank maps: the plain C that pypar's ops on symmetric tensors are held against.
 * all_reduce: each rank sums its part and writes it to all. The others push (write into the peer's output) or pull
 * (read the peer's input); push or pull, plain or non-temporal stores are tried for each op and size, the best is used.
 * argv: control path, max bytes, data path, rank, world.
 */
#include "bench.h"
#include "copy.h"

static counter* arrived;
static uint32_t base;
static float *in_of[kMaxRanks], *out_of[kMaxRanks];
static struct {
  int pull;
  enum copy_kind kind;
} cfg;

static void meet(void) {
  base++;
  notify(&arrived[ctx.rank].value, base);
  for (int r = 0; r < ctx.world; r++) wait_for(&arrived[r].value, base);
}

/* The even rank's input to the odd one's output, then back. Arrival is the permission for the way back. */
static void there_and_back(size_t num) {
  int even = ctx.rank & ~1, peer = ctx.rank ^ 1;
  for (int leg = 0; leg < 2; leg++) {
    uint32_t ready = base + 1 + 2 * (uint32_t)leg, done = ready + 1;
    if (ctx.rank == even + leg) {
      if (!cfg.pull) copy(out_of[peer], ctx.in, num, cfg.kind);
      notify(&arrived[ctx.rank].value, ready);
      if (cfg.pull) wait_for(&arrived[peer].value, done);
    } else {
      wait_for(&arrived[peer].value, ready);
      if (cfg.pull) copy(ctx.out, in_of[peer], num, cfg.kind);
      if (cfg.pull) notify(&arrived[ctx.rank].value, done);
    }
  }
  base += 4;
}

static void program_run(enum op op, size_t num, int root) {
  size_t part = num / (size_t)ctx.world, mine = (size_t)ctx.rank * part;
  const float* src[kMaxRanks];
  float* dst[kMaxRanks];
  if (op == kSend) {
    there_and_back(num);
    return;
  }
  for (int r = 0; r < ctx.world; r++) src[r] = in_of[r] + mine, dst[r] = in_of[r] + mine;
  meet();
  if (op == kAllReduce) sum_to_all(dst, src, ctx.world, part, cfg.kind);
  if (op == kReduceScatter) sum(ctx.out, src, ctx.world, part, cfg.kind);
  if (op == kBroadcast && cfg.pull && ctx.rank != root) copy(ctx.in, in_of[root], num, cfg.kind);
  for (int k = 0; k < ctx.world; k++) {
    int r = (ctx.rank + k) % ctx.world;
    size_t theirs = (size_t)r * part;
    if (op == kBroadcast && !cfg.pull && ctx.rank == root && r != root) copy(in_of[r], ctx.in, num, cfg.kind);
    if (op == kAllGather && cfg.pull) copy(ctx.out + theirs, in_of[r], part, cfg.kind);
    if (op == kAllGather && !cfg.pull) copy(out_of[r] + mine, ctx.in, part, cfg.kind);
    if (op == kAllToAll && cfg.pull) copy(ctx.out + theirs, in_of[r] + mine, part, cfg.kind);
    if (op == kAllToAll && !cfg.pull) copy(out_of[r] + mine, ctx.in + theirs, part, cfg.kind);
  }
  meet();
}

static int program_has(enum op op) {
  return op != kAllReduceOut;
}

static int program_num_configs(enum op op, size_t bytes) {
  int kinds = bytes < (1 << 20) ? 1 : 3;
  return op == kAllReduce || op == kReduceScatter ? (kinds > 1 ? 2 : 1) : 2 * kinds;
}

static void program_use_config(enum op op, size_t bytes, int config, char* name, size_t size) {
  int reduces = op == kAllReduce || op == kReduceScatter;
  int kinds = program_num_configs(op, bytes) / (reduces ? 1 : 2);
  cfg.kind = (enum copy_kind)(config % kinds);
  cfg.pull = reduces ? op == kReduceScatter : config / kinds;
  snprintf(name, size, "%s %s", cfg.pull ? "pull" : "push", kCopyNames[cfg.kind]);
}

static void program_setup(int argc, char** argv) {
  if (argc < 6) die("argv: control, max bytes, data, rank, world");
  ctx.rank = atoi(argv[4]), ctx.world = atoi(argv[5]);
  prctl(PR_SET_PDEATHSIG, SIGKILL);
  pin(ctx.rank);
  size_t each = (ctx.max_bytes + 4095) / 4096 * 4096;
  char* data = (char*)map_shared(argv[3], kMaxRanks * kLine + 2 * (size_t)ctx.world * each);
  arrived = (counter*)data;
  for (int r = 0; r < ctx.world; r++) {
    in_of[r] = (float*)(data + kMaxRanks * kLine + (size_t)(2 * r) * each);
    out_of[r] = (float*)(data + kMaxRanks * kLine + (size_t)(2 * r + 1) * each);
  }
  ctx.in = in_of[ctx.rank], ctx.out = out_of[ctx.rank];
  memset(ctx.in, 1, ctx.max_bytes);
  memset(ctx.out, 1, ctx.max_bytes);
}

static void program_end(void) {}
