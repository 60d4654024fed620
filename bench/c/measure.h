/* Verification, timing and the choice of a configuration; a part of bench.h, included there. */
#ifndef PYPAR_BENCH_MEASURE_H
#define PYPAR_BENCH_MEASURE_H

/* Small integers: every sum over 16 ranks is exact, and no two neighbours agree. */
static inline float element(int rank, size_t i, int salt) {
  return (float)((rank + 1) * (int)(1 + (i + (size_t)salt) % 1021));
}

static float expected(enum op op, size_t i, size_t part, int root, int salt) {
  float sum = 0;
  switch (op) {
    case kAllReduce:
    case kAllReduceOut:
      for (int r = 0; r < ctx.world; r++) sum += element(r, i, salt);
      return sum;
    case kReduceScatter:
      for (int r = 0; r < ctx.world; r++) sum += element(r, (size_t)ctx.rank * part + i, salt);
      return sum;
    case kAllGather: return element((int)(i / part), i % part, salt);
    case kAllToAll: return element((int)(i / part), (size_t)ctx.rank * part + i % part, salt);
    case kBroadcast: return element(root, i, salt);
    default: return element(ctx.rank ^ 1, i, salt); /* send: there and back, each rank ends with its peer's */
  }
}

static void verify(enum op op, size_t bytes) {
  static int salt = 0;
  salt++;
  size_t num = bytes / 4, part = num / (size_t)ctx.world;
  int root = salt % ctx.world;
  size_t num_in = op == kAllGather ? part : num, num_out = op == kReduceScatter ? part : num;
  for (size_t i = 0; i < num_in; i++) ctx.in[i] = element(ctx.rank, i, salt);
  for (size_t i = 0; i < num; i++) ctx.out[i] = -1;
  barrier();
  program_run(op, num, root);
  barrier();
  const float* got = op == kAllReduce || op == kBroadcast ? ctx.in : ctx.out;
  char* error = ctx.control->error[ctx.rank];
  error[0] = 0;
  for (size_t i = 0; i < num_out; i++) {
    float want = expected(op, i, part, root, salt);
    if (got[i] != want) {
      snprintf(error, sizeof ctx.control->error[0], "rank %d: element %zu of %s is %g, expected %g", ctx.rank, i,
               kOpNames[op], (double)got[i], (double)want);
      break;
    }
  }
  barrier();
}

/* Samples of one op in control->us, per rank. A send is half of there-and-back. */
static void measure(enum op op, size_t bytes, int iters, int num_samples) {
  size_t num = bytes / 4, num_in = op == kAllGather ? num / (size_t)ctx.world : num;
  for (int s = 0; s < num_samples; s++) {
    if (bytes >= kAloneBytes || s == 0)
      for (size_t i = 0; i < num_in; i++) ctx.in[i] = (float)(ctx.rank + s + 1);
    barrier();
    double start = now_us();
    for (int k = 0; k < iters; k++) program_run(op, num, (s + k) % ctx.world); /* roots alternate: none runs ahead */
    double each = (now_us() - start) / iters;
    ctx.control->us[ctx.rank][s] = op == kSend ? each / 2 : each;
  }
  barrier();
}

static double slowest(int sample) {
  double us = 0;
  for (int r = 0; r < ctx.world; r++) us = ctx.control->us[r][sample] > us ? ctx.control->us[r][sample] : us;
  return us;
}

static int by_value(const void* a, const void* b) {
  double x = *(const double*)a, y = *(const double*)b;
  return (x > y) - (x < y);
}

/* Tries every configuration, in two rounds, and keeps the one with the fastest lower quartile: another process on a
 * core spoils some samples. */
static void tune(enum op op, size_t bytes, int print) {
  control_page* c = ctx.control;
  int num_configs = program_num_configs(op, bytes), best = 0;
  int iters = bytes >= kAloneBytes ? 1 : 200, rounds = 2, per_round = bytes > (8 << 20) ? 3 : 7;
  static double all[kMaxConfigs][16];
  double best_us = 0;
  for (int round = 0; round < rounds && (num_configs > 1 || print); round++)
    for (int k = 0; k < num_configs; k++) {
      program_use_config(op, bytes, k, c->choice, sizeof c->choice);
      measure(op, bytes, iters, per_round);
      for (int s = 0; s < per_round; s++) all[k][round * per_round + s] = slowest(s);
      barrier();
    }
  if (print && ctx.rank == 0) printf("{\"configs\": {");
  for (int k = 0; k < num_configs; k++) {
    char name[64];
    program_use_config(op, bytes, k, name, sizeof name);
    qsort(all[k], (size_t)(rounds * per_round), sizeof(double), by_value);
    double us = all[k][rounds * per_round / 4];
    if (k == 0 || us < best_us) best = k, best_us = us;
    if (print && ctx.rank == 0) printf("%s\"%s\": %.2f", k ? ", " : "", name, us);
  }
  if (print && ctx.rank == 0) printf("}}\n");
  if (ctx.rank == 0) c->config = best;
  barrier();
  program_use_config(op, bytes, c->config, c->choice, sizeof c->choice);
}

/* The configuration of (op, bytes), tuned when first asked for. */
static void choose(enum op op, size_t bytes, int again) {
  static struct {
    enum op op;
    size_t bytes;
    int config;
  } known[256];
  static int num_known = 0;
  int k = 0;
  while (k < num_known && (known[k].op != op || known[k].bytes != bytes)) k++;
  if (k == num_known || again) {
    tune(op, bytes, again);
    if (k == num_known && num_known < 255) num_known++;
    known[k].op = op, known[k].bytes = bytes, known[k].config = ctx.control->config;
  }
  program_use_config(op, bytes, known[k].config, ctx.control->choice, sizeof ctx.control->choice);
}
#endif
