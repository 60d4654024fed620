/* The same ops through an MPI library, with the same clock and checks. argv: control path, max bytes. */
#include <mpi.h>

#include "bench.h"

static void program_run(enum op op, size_t num, int root) {
  int n = (int)num, part = (int)(num / (size_t)ctx.world), peer = ctx.rank ^ 1;
  MPI_Comm world = MPI_COMM_WORLD;
  switch (op) {
    case kAllReduce: MPI_Allreduce(MPI_IN_PLACE, ctx.in, n, MPI_FLOAT, MPI_SUM, world); break;
    case kAllReduceOut: MPI_Allreduce(ctx.in, ctx.out, n, MPI_FLOAT, MPI_SUM, world); break;
    case kReduceScatter: MPI_Reduce_scatter_block(ctx.in, ctx.out, part, MPI_FLOAT, MPI_SUM, world); break;
    case kAllGather: MPI_Allgather(ctx.in, part, MPI_FLOAT, ctx.out, part, MPI_FLOAT, world); break;
    case kAllToAll: MPI_Alltoall(ctx.in, part, MPI_FLOAT, ctx.out, part, MPI_FLOAT, world); break;
    case kBroadcast: MPI_Bcast(ctx.in, n, MPI_FLOAT, root, world); break;
    default:
      if (ctx.rank % 2 == 0) {
        MPI_Send(ctx.in, n, MPI_FLOAT, peer, 0, world);
        MPI_Recv(ctx.out, n, MPI_FLOAT, peer, 0, world, MPI_STATUS_IGNORE);
      } else {
        MPI_Recv(ctx.out, n, MPI_FLOAT, peer, 0, world, MPI_STATUS_IGNORE);
        MPI_Send(ctx.in, n, MPI_FLOAT, peer, 0, world);
      }
  }
}

static int program_has(enum op op) {
  return op != kNumOps;
}
static int program_num_configs(enum op op, size_t bytes) {
  return (void)op, (void)bytes, 1;
}

static void program_use_config(enum op op, size_t bytes, int config, char* name, size_t size) {
  (void)op, (void)bytes, (void)config;
  snprintf(name, size, "default");
}

static void program_setup(int argc, char** argv) {
  MPI_Init(&argc, &argv);
  MPI_Comm_rank(MPI_COMM_WORLD, &ctx.rank);
  MPI_Comm_size(MPI_COMM_WORLD, &ctx.world);
  pin(ctx.rank);
  ctx.in = private_buffer(ctx.max_bytes);
  ctx.out = private_buffer(ctx.max_bytes);
}

static void program_end(void) {
  MPI_Finalize();
}
