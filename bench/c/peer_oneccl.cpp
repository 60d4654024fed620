/* The same ops through oneCCL on CPU. argv: control path, max bytes. */
#include <memory>
#include <oneapi/ccl.hpp>

#include "bench.h"

/* oneCCL's CPU library calls a profiler through these; null says that there is none. */
#define NO_PROFILER(name)                  \
  extern "C" {                             \
  void* __itt_##name##_ptr__3_0 = nullptr; \
  }
NO_PROFILER(domain_create)
NO_PROFILER(event_create)
NO_PROFILER(event_start)
NO_PROFILER(event_end)
NO_PROFILER(metadata_add)
NO_PROFILER(string_handle_create)
NO_PROFILER(task_begin)
NO_PROFILER(task_end)
NO_PROFILER(thread_set_name)

static std::unique_ptr<ccl::communicator> comm;

static void program_run(enum op op, size_t num, int root) {
  size_t part = num / (size_t)ctx.world;
  int peer = ctx.rank ^ 1;
  switch (op) {
    case kAllReduce: ccl::allreduce(ctx.in, ctx.in, num, ccl::reduction::sum, *comm).wait(); break;
    case kAllReduceOut: ccl::allreduce(ctx.in, ctx.out, num, ccl::reduction::sum, *comm).wait(); break;
    case kReduceScatter: ccl::reduce_scatter(ctx.in, ctx.out, part, ccl::reduction::sum, *comm).wait(); break;
    case kAllGather: ccl::allgather(ctx.in, ctx.out, part, *comm).wait(); break;
    case kAllToAll: ccl::alltoall(ctx.in, ctx.out, part, *comm).wait(); break;
    case kBroadcast: ccl::broadcast(ctx.in, num, root, *comm).wait(); break;
    default:
      if (ctx.rank % 2 == 0) {
        ccl::send(ctx.in, num, peer, *comm).wait();
        ccl::recv(ctx.out, num, peer, *comm).wait();
      } else {
        ccl::recv(ctx.out, num, peer, *comm).wait();
        ccl::send(ctx.in, num, peer, *comm).wait();
      }
  }
}

static int program_has(enum op op) {
  return op != kNumOps;
}
static int program_num_configs(enum op, size_t) {
  return 1;
}
static void program_use_config(enum op, size_t, int, char* name, size_t size) {
  snprintf(name, size, "default");
}

/* Started by Intel MPI's mpiexec. Rank 0's address travels through the control page. */
static void program_setup(int, char**) {
  const char *rank = getenv("PMI_RANK"), *world = getenv("PMI_SIZE");
  if (rank == nullptr || world == nullptr) die("start me with mpiexec");
  ctx.rank = atoi(rank), ctx.world = atoi(world);
  pin(ctx.rank);
  ccl::init();
  ccl::kvs::address_type address;
  static_assert(sizeof address <= sizeof ctx.control->address, "the control page is too small");
  std::shared_ptr<ccl::kvs> kvs;
  if (ctx.rank == 0) {
    kvs = ccl::create_main_kvs();
    address = kvs->get_address();
    memcpy(ctx.control->address, address.data(), sizeof address);
    notify(&ctx.control->address_there.value, 1);
  } else {
    wait_for(&ctx.control->address_there.value, 1);
    memcpy(address.data(), ctx.control->address, sizeof address);
    kvs = ccl::create_kvs(address);
  }
  comm = std::make_unique<ccl::communicator>(ccl::create_communicator(ctx.world, ctx.rank, kvs));
  ctx.in = private_buffer(ctx.max_bytes);
  ctx.out = private_buffer(ctx.max_bytes);
}

static void program_end() {
  comm.reset();
}
