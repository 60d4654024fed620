/* Collectives on ordinary memory, staged through shared memory: the plain C that pypar's ops on ordinary tensors are
 * held against. Each rank copies a chunk into its own shared slot and reads its peers'; two slots per rank, so that the
 * next chunk is copied in while the peers still read the last one. Chunk size and kind of copy are tried for each op
 * and size; the best is used. argv: control path, max bytes, data path, rank, world.
 */
#include "bench.h"
#include "copy.h"

enum { kSlots = 2 };
static const size_t kStageBytes = 32 << 20; /* per rank */
/* Every chunk below the tensor's size is tried, and the whole tensor, as far as the stage holds it. */
static const size_t kChunks[] = {16 << 10, 64 << 10, 256 << 10, 512 << 10, 1 << 20, 2 << 20, 4 << 20};
enum { kNumChunks = sizeof kChunks / sizeof kChunks[0] };

static counter *full, *taken; /* [world]: chunks that a rank has published; has taken from all its peers */
static float* stage_of[kMaxRanks];
static uint32_t base; /* chunks before this call, the same number on every rank */
static struct {
  size_t chunk;           /* floats of one slot */
  enum copy_kind in, out; /* into the stage; into the tensor */
} cfg;

typedef struct {
  enum op op;
  size_t part, piece; /* floats per rank; floats per chunk and destination */
  int from, to;       /* broadcast: root, -1; send: from, to */
} job;

static float* slot(int rank, uint32_t k) {
  return stage_of[rank] + (k % kSlots) * cfg.chunk;
}

static int is_source(const job* j) {
  return j->from < 0 || j->from == ctx.rank;
}
static int is_taker(const job* j) {
  return j->from < 0 || (j->to < 0 ? j->from != ctx.rank : j->to == ctx.rank);
}

/* The last chunk in this slot must have been taken; then copy in and publish. */
static void put(const job* j, uint32_t k) {
  size_t begin = (size_t)k * j->piece, num = j->part - begin < j->piece ? j->part - begin : j->piece;
  uint32_t number = base + k;
  for (int r = 0; r < ctx.world; r++)
    if (r != ctx.rank && (j->to < 0 || r == j->to)) wait_for(&taken[r].value, number + 1 - kSlots);
  float* mine = slot(ctx.rank, number);
  if (j->op == kReduceScatter || j->op == kAllToAll) {
    for (int r = 0; r < ctx.world; r++)
      if (r != ctx.rank) copy(mine + (size_t)r * j->piece, ctx.in + (size_t)r * j->part + begin, num, cfg.in);
  } else {
    copy(mine, ctx.in + begin, num, cfg.in);
  }
  if (j->op == kAllGather) copy(ctx.out + (size_t)ctx.rank * j->part + begin, ctx.in + begin, num, cfg.out);
  notify(&full[ctx.rank].value, number + 1);
}

static void take(const job* j, uint32_t k) {
  size_t begin = (size_t)k * j->piece, num = j->part - begin < j->piece ? j->part - begin : j->piece;
  uint32_t number = base + k;
  const float* src[kMaxRanks];
  size_t mine = (size_t)ctx.rank;
  for (int r = 0; r < ctx.world; r++) {
    if (r != ctx.rank && (j->from < 0 || r == j->from)) wait_for(&full[r].value, number + 1);
    src[r] = slot(r, number);
    if (j->op == kReduceScatter || j->op == kAllToAll) src[r] += mine * j->piece;
  }
  if (j->op == kReduceScatter || j->op == kAllToAll) src[ctx.rank] = ctx.in + mine * j->part + begin;
  if (j->op == kAllReduce) src[ctx.rank] = ctx.in + begin;
  if (j->op == kAllReduce) sum(ctx.in + begin, src, ctx.world, num, cfg.out);
  if (j->op == kReduceScatter) sum(ctx.out + begin, src, ctx.world, num, cfg.out);
  if (j->op == kAllGather || j->op == kAllToAll)
    for (int r = 0; r < ctx.world; r++)
      if (r != ctx.rank || j->op == kAllToAll) copy(ctx.out + (size_t)r * j->part + begin, src[r], num, cfg.out);
  if (j->op == kBroadcast) copy(ctx.in + begin, src[j->from], num, cfg.out);
  if (j->op == kSend) copy(ctx.out + begin, src[j->from], num, cfg.out);
  notify(&taken[ctx.rank].value, number + 1);
}

static void run_job(job j) {
  int split = j.op == kReduceScatter || j.op == kAllToAll;
  j.piece = split ? cfg.chunk / (size_t)ctx.world / 16 * 16 : cfg.chunk;
  uint32_t chunks = (uint32_t)((j.part + j.piece - 1) / j.piece);
  for (uint32_t k = 0; k <= chunks; k++) { /* one chunk ahead: put k, then take k - 1 */
    if (k < chunks && is_source(&j)) put(&j, k);
    if (k > 0 && is_taker(&j)) take(&j, k - 1);
  }
  base += chunks;
  if (!is_taker(&j)) notify(&taken[ctx.rank].value, base);
}

static void program_run(enum op op, size_t num, int root) {
  size_t part = num / (size_t)ctx.world;
  int even = ctx.rank & ~1, odd = even + 1;
  if (op == kAllReduce) run_job((job){op, num, 0, -1, -1});
  if (op == kReduceScatter || op == kAllGather || op == kAllToAll) run_job((job){op, part, 0, -1, -1});
  if (op == kBroadcast) run_job((job){op, num, 0, root, -1});
  if (op == kSend) run_job((job){op, num, 0, even, odd}), run_job((job){op, num, 0, odd, even});
}

static int program_has(enum op op) {
  return op != kAllReduceOut;
}

static int num_chunks(size_t bytes) {
  int n = 1;
  while (n - 1 < kNumChunks && kChunks[n - 1] < bytes) n++;
  return n;
}

/* Chunk sizes, times the kinds of copy that can pay at this size. */
static int program_num_configs(enum op op, size_t bytes) {
  (void)op;
  int n = num_chunks(bytes);
  return bytes < (256 << 10) ? n : bytes < (4 << 20) ? 2 * n : 3 * n;
}

static void program_use_config(enum op op, size_t bytes, int config, char* name, size_t size) {
  int n = num_chunks(bytes), k = config % n, kind = config / n;
  size_t chunk = k > 0 ? kChunks[k - 1] : bytes < 4096 ? 4096 : bytes;
  if (chunk > kStageBytes / kSlots) chunk = kStageBytes / kSlots;
  cfg.chunk = chunk / 4;
  cfg.in = kind == 1 ? kMemcpy : kPlain;
  cfg.out = kind == 1 ? kMemcpy : kind == 2 ? kStream : kPlain;
  snprintf(name, size, "%zuK %s", chunk >> 10, kCopyNames[cfg.out]);
  (void)op;
}

static void program_setup(int argc, char** argv) {
  if (argc < 6) die("argv: control, max bytes, data, rank, world");
  ctx.rank = atoi(argv[4]), ctx.world = atoi(argv[5]);
  prctl(PR_SET_PDEATHSIG, SIGKILL);
  pin(ctx.rank);
  char* data = (char*)map_shared(argv[3], 2 * kMaxRanks * kLine + (size_t)ctx.world * kStageBytes);
  full = (counter*)data, taken = full + kMaxRanks;
  for (int r = 0; r < ctx.world; r++) stage_of[r] = (float*)(data + 2 * kMaxRanks * kLine + (size_t)r * kStageBytes);
  for (size_t i = 0; i < kStageBytes / 4; i += 1024) stage_of[ctx.rank][i] = 0;
  ctx.in = private_buffer(ctx.max_bytes);
  ctx.out = private_buffer(ctx.max_bytes);
}

static void program_end(void) {}
