// bytes_moved NUMEL: one call of every kernel on two ranks, threads of this process, and what each loads and stores.
//
// A line for each kernel and rank: name, rank, bytes read, written, stored to peers, loaded from peers. Compiled with
// -fsanitize=thread, which reports every access to count_accesses.cpp.

#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "count_accesses.h"
#include "cuda/all_gather.cuh"
#include "cuda/all_reduce.cuh"
#include "cuda/ring_recv.cuh"
#include "cuda/zero_scatter.cuh"
#include "cuda/zero_step.cuh"
#include "pypar/launch.cuh"

using namespace pypar;

namespace {

using Bf16 = __nv_bfloat16;
using emulation::Place;

constexpr int kWorld = 2;
const dim3 kGrid(4), kBlock(64);

using Memory = std::unique_ptr<char[]>;

// Zeros, at an address as aligned as an allocator of a GPU gives it.
char* aligned(Memory& memory, size_t bytes) {
  memory.reset(new char[bytes + 512]());
  return memory.get() + (256 - reinterpret_cast<uintptr_t>(memory.get()) % 256);
}

struct World {
  int64_t slot_bytes;
  Memory memory[kWorld];
  int64_t pointers[kWorld];

  explicit World(int64_t slot) : slot_bytes(slot) {
    for (int r = 0; r < kWorld; ++r) pointers[r] = reinterpret_cast<int64_t>(aligned(memory[r], bytes()));
  }
  size_t bytes() const { return static_cast<size_t>(slots_offset(kWorld) + 2 * slot_bytes); }
};

// What one rank has; all of it is counted.
struct Rank {
  Channel channel;
  int64_t n;
  Cuts cuts{};
  std::vector<Memory> tensors;

  Rank(const World& world, int rank, int64_t numel)
      : channel{world.pointers, rank, kWorld, world.slot_bytes, 10'000'000'000, nullptr}, n(numel) {
    for (int r = 0; r < kWorld; ++r) {
      const char* begin = reinterpret_cast<const char*>(world.pointers[r]);
      const int64_t flags = r == rank ? slots_offset(kWorld) : 0;
      emulation::count_in(begin + flags, world.bytes() - static_cast<size_t>(flags),
                          r == rank ? Place::own : Place::peer);
      cuts.begin[r + 1] = numel * (r + 1) / kWorld;
    }
  }
  int64_t shard() const { return cuts.num(channel.rank); }

  template <typename T>
  T* tensor(int64_t num) {
    tensors.emplace_back();
    const size_t bytes = static_cast<size_t>(num) * sizeof(T);
    char* made = aligned(tensors.back(), bytes);
    emulation::count_in(made, bytes, Place::own);
    return reinterpret_cast<T*>(made);
  }
  template <typename Params>
  void run(void (*kernel)(Params), const Params& params, size_t shared_bytes = 0) {
    launch(kernel, kGrid, kBlock, shared_bytes, nullptr, params, true);
  }
};

template <typename T>
void one_shot(Rank& rank) {
  T* x = rank.tensor<T>(rank.n);
  rank.run(one_shot_all_reduce<T>, AllReduceParams{x, rank.tensor<T>(rank.n), rank.n, Reduction::sum, rank.channel});
}

template <typename T>
void two_shot(Rank& rank) {
  T* x = rank.tensor<T>(rank.n);
  rank.run(two_shot_all_reduce<T>, AllReduceParams{x, rank.tensor<T>(rank.n), rank.n, Reduction::sum, rank.channel});
}

template <typename T>
void reduce_scatter(Rank& rank) {
  T *x = rank.tensor<T>(rank.n), *out = rank.tensor<T>(rank.shard());
  rank.run(reduce_scatter_kernel<T>, ReduceScatterParams{x, out, rank.cuts, Reduction::sum, rank.channel});
}

// T: of as many bytes, as the launcher takes it.
template <typename T>
void all_gather(Rank& rank) {
  T *shard = rank.tensor<T>(rank.shard()), *full = rank.tensor<T>(rank.n);
  rank.run(all_gather_kernel<T>, AllGatherParams{shard, full, rank.cuts, rank.channel});
}

template <typename T>
void copied(Rank& rank) {
  const Channel& channel = rank.channel;
  T* shard = rank.tensor<T>(rank.shard());
  constexpr int64_t kItem = sizeof(T);
  const int64_t begin = rank.cuts.begin[channel.rank] * kItem;
  push_by_copies(channel, shard, begin, rank.shard() * kItem, channel.pointers, nullptr);
  launch(wait_kernel, dim3(1), kBlock, 0, nullptr, channel, true);
  launch(finish_kernel, dim3(1), dim3(1), 0, nullptr, channel, false);
}

template <typename T>
void zero_scatter(Rank& rank) {
  T* full = rank.tensor<T>(rank.n);
  float* shard = rank.tensor<float>(rank.shard());
  double *partial = rank.tensor<double>(kGrid.x), *squares = rank.tensor<double>(1);
  rank.run(zero_scatter_kernel<T>,
           ZeroScatterParams{full, shard, partial, squares, rank.cuts, 0.5f, true, rank.channel},
           kBlock.x * sizeof(double));
}

template <typename T>
void zero_step(Rank& rank) {
  T *grad = rank.tensor<T>(rank.n), *low = rank.tensor<T>(rank.shard());
  float* state[4];  // param, exp_avg, exp_avg_sq, max_exp_avg_sq
  for (float*& one : state) one = rank.tensor<float>(rank.shard());
  const AdamWFactors factors{1, 0, 0.99f, 1e-8f, 0.1f, 0.01f, 1, 0.1f, 1, true, false};
  rank.run(zero_step_kernel<T>, ZeroStepParams{state[0], state[1], state[2], state[3], grad, low, nullptr, rank.cuts,
                                               factors, rank.channel});
}

// To the other rank, and from it; the receiver reads where the message lies.
template <typename T>
void ring(Rank& rank) {
  const int peer = 1 - rank.channel.rank;
  const Ring ring{rank.channel, peer, 1, 2};
  RingSendParams send{ring, {}};
  send.header.ndim = 1, send.header.sizes[0] = rank.n;
  const T* x = rank.tensor<T>(rank.n);
  send_by_copy(send, rank.channel.pointers[peer], x, rank.n * static_cast<int64_t>(sizeof(T)), nullptr);
  RingHeader* header = rank.tensor<RingHeader>(1);
  launch(ring_wait_kernel, dim3(1), dim3(1), 0, nullptr, RingRecvParams{ring, header}, true);
  launch(ring_credit_kernel, dim3(1), dim3(1), 0, nullptr, RingRecvParams{ring, nullptr}, false);
}

const std::vector<std::pair<const char*, void (*)(Rank&)>> kKernels{
    {"one_shot_all_reduce float32", one_shot<float>},  {"one_shot_all_reduce bfloat16", one_shot<Bf16>},
    {"two_shot_all_reduce float32", two_shot<float>},  {"two_shot_all_reduce bfloat16", two_shot<Bf16>},
    {"reduce_scatter float32", reduce_scatter<float>}, {"reduce_scatter bfloat16", reduce_scatter<Bf16>},
    {"all_gather float32", all_gather<uint32_t>},      {"all_gather bfloat16", all_gather<uint16_t>},
    {"all_gather_copied float32", copied<uint32_t>},   {"zero_scatter bfloat16", zero_scatter<Bf16>},
    {"zero_step bfloat16", zero_step<Bf16>},           {"ring float32", ring<float>},
};

}  // namespace

int main(int count, char** arguments) {
  if (count != 2) return 2;
  const int64_t numel = std::atoi(arguments[1]);
  for (const auto& [name, call] : kKernels) {
    const World world((kWorld * numel * 8 + 4096 + 255) / 256 * 256);
    emulation::Counts found[kWorld];
    std::vector<std::thread> ranks;
    for (int r = 0; r < kWorld; ++r) {
      ranks.emplace_back([&, r, call = call] {
        Rank rank(world, r, numel);
        call(rank);
        found[r] = emulation::counts();
      });
    }
    for (std::thread& rank : ranks) rank.join();
    for (int r = 0; r < kWorld; ++r) {
      const emulation::Counts& c = found[r];
      std::printf("%s %d %ld %ld %ld %ld\n", name, r, (long)c.read, (long)c.written, (long)c.to_peers,
                  (long)c.from_peers);
    }
  }
}
