// Ranks as threads of one process, so that ThreadSanitizer sees every access: all collectives, all sizes around the
// algorithms' thresholds, a different payload in every call, seeded stalls before each publish and each consume.
// usage: collectives_test WORLD CALLS SEED [nostall]

#include <cinttypes>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <thread>
#include <vector>

#include "comm/communicator.h"

using namespace pypar;

namespace {

int world, num_calls;
unsigned seed;

void stall(int rank, uint32_t round) {
  // A pure function of (seed, rank, round): the same run stalls in the same places.
  uint32_t x = (seed * 2654435761u) ^ (static_cast<uint32_t>(rank) * 40503u) ^ (round * 2246822519u);
  x ^= x >> 15;
  if (x % 7 == 0) std::this_thread::sleep_for(std::chrono::microseconds(x % 300));
}

float value(int call, int rank, int64_t i) {
  return static_cast<float>((call * 31 + rank * 17 + i * 7) % 1021);
}

#define EXPECT(condition, ...)                                               \
  do {                                                                       \
    if (!(condition)) {                                                      \
      std::fprintf(stderr, "rank %d call %d: %s: ", rank, call, #condition); \
      std::fprintf(stderr, __VA_ARGS__);                                     \
      std::fprintf(stderr, "\n");                                            \
      std::exit(1);                                                          \
    }                                                                        \
  } while (0)

void run_rank(std::unique_ptr<Mesh> mesh) {
  Communicator comm(std::move(mesh));
  const int rank = comm.rank();
  std::mt19937 random(seed);  // the same on every rank: the ranks make the same calls
  const int64_t sizes[] = {0, 1, 7, 8, 9, 100, 4096, 16384, 16385, 65536, 262144, 300001, 700003};
  constexpr int64_t kWindowItems = 700100;
  Segment memory = Segment::create(kWindowItems * sizeof(float));
  auto window = comm.rendezvous(memory.fd(), memory.data(), memory.bytes(), Deadline::after(std::chrono::seconds(60)));
  auto* symmetric = reinterpret_cast<float*>(memory.data());
  for (int call = 0; call < num_calls; ++call) {
    const auto deadline = Deadline::after(std::chrono::seconds(60));
    const int64_t n = sizes[random() % (sizeof sizes / sizeof *sizes)];
    const int root = static_cast<int>(random() % static_cast<unsigned>(world));
    // Whether this rank's tensor is symmetric; ranks that differ must all take the staged path.
    const unsigned mode = random() % 3;
    const bool use_window = mode == 0 || (mode == 1 && rank == 0);
    std::vector<float> own(static_cast<size_t>(n * world + 1));
    float* data = use_window ? symmetric : own.data();
    auto sum_at = [&](int64_t i) {
      float sum = 0;
      for (int r = 0; r < world; ++r) sum += value(call, r, i);
      return sum;
    };
    switch (random() % 7) {
      case 0: {
        for (int64_t i = 0; i < n; ++i) data[i] = value(call, rank, i);
        comm.all_reduce(data, data, n, DType::f32, ReduceOp::sum, deadline);
        for (int64_t i = 0; i < n; ++i) EXPECT(data[i] == sum_at(i), "all_reduce[%" PRId64 "] of %" PRId64, i, n);
        break;
      }
      case 1: {
        std::vector<int64_t> counts(static_cast<size_t>(world));
        std::vector<const void*> ins(static_cast<size_t>(world));
        int64_t begin = 0, mine = 0;
        for (int r = 0; r < world; ++r) {
          counts[static_cast<size_t>(r)] = r == 0 ? n - (n / world) * (world - 1) : n / world;
          ins[static_cast<size_t>(r)] = data + begin;
          if (r == rank) mine = begin;
          begin += counts[static_cast<size_t>(r)];
        }
        for (int64_t i = 0; i < n; ++i) data[i] = value(call, rank, i);
        std::vector<float> out(static_cast<size_t>(counts[static_cast<size_t>(rank)] + 1));
        comm.reduce_scatter(ins.data(), counts.data(), out.data(), DType::f32, ReduceOp::sum, deadline);
        for (int64_t i = 0; i < counts[static_cast<size_t>(rank)]; ++i) {
          EXPECT(out[static_cast<size_t>(i)] == sum_at(mine + i), "reduce_scatter[%" PRId64 "] of %" PRId64, i, n);
        }
        break;
      }
      case 2: {
        std::vector<int64_t> bytes(static_cast<size_t>(world));
        std::vector<void*> outs(static_cast<size_t>(world));
        int64_t begin = 0;
        for (int r = 0; r < world; ++r) {
          const int64_t items = r == world - 1 ? n - (n / world) * (world - 1) : n / world;
          bytes[static_cast<size_t>(r)] = items * 4;
          outs[static_cast<size_t>(r)] = data + begin;
          begin += items;
        }
        std::vector<float> in(static_cast<size_t>(bytes[static_cast<size_t>(rank)] / 4 + 1));
        for (size_t i = 0; i + 1 < in.size(); ++i) in[i] = value(call, rank, static_cast<int64_t>(i));
        comm.all_gather(in.data(), bytes.data(), outs.data(), deadline, DType::f32);
        for (int r = 0; r < world; ++r) {
          for (int64_t i = 0; i < bytes[static_cast<size_t>(r)] / 4; ++i) {
            EXPECT(static_cast<float*>(outs[static_cast<size_t>(r)])[i] == value(call, r, i), "all_gather from %d", r);
          }
        }
        break;
      }
      case 3: {
        std::vector<int64_t> send(static_cast<size_t>(world)), recv(static_cast<size_t>(world));
        std::vector<std::vector<float>> out;
        std::vector<const void*> ins;
        std::vector<void*> outs;
        auto items = [&](int s, int d) {
          return n / world + (s * 3 + d * 5) % 4 * (n > 100);
        };
        std::vector<float> spare(static_cast<size_t>(n + 100));
        float* next = use_window ? symmetric : spare.data();
        for (int r = 0; r < world; ++r) {
          send[static_cast<size_t>(r)] = items(rank, r) * 4;
          recv[static_cast<size_t>(r)] = items(r, rank) * 4;
          out.emplace_back(static_cast<size_t>(items(r, rank) + 1));
          ins.push_back(next);
          for (int64_t i = 0; i < items(rank, r); ++i) *next++ = value(call + r, rank, i);
        }
        for (auto& part : out) outs.push_back(part.data());
        comm.all_to_all(ins.data(), send.data(), outs.data(), recv.data(), deadline, DType::f32);
        for (int r = 0; r < world; ++r) {
          for (int64_t i = 0; i < items(r, rank); ++i) {
            EXPECT(out[static_cast<size_t>(r)][static_cast<size_t>(i)] == value(call + rank, r, i),
                   "all_to_all from %d", r);
          }
        }
        break;
      }
      case 4: {
        for (int64_t i = 0; i < n; ++i) data[i] = rank == root ? value(call, root, i) : -1.0f;
        comm.broadcast(data, n * 4, root, deadline, DType::f32);
        for (int64_t i = 0; i < n; ++i) EXPECT(data[i] == value(call, root, i), "broadcast[%" PRId64 "]", i);
        break;
      }
      case 5: {
        std::vector<float> out(static_cast<size_t>(n + 1));
        for (int64_t i = 0; i < n; ++i) data[i] = value(call, rank, i);
        comm.reduce(data, out.data(), n, DType::f32, ReduceOp::max, root, deadline);
        if (rank == root) {
          for (int64_t i = 0; i < n; ++i) {
            float largest = value(call, 0, i);
            for (int r = 1; r < world; ++r) largest = std::max(largest, value(call, r, i));
            EXPECT(out[static_cast<size_t>(i)] == largest, "reduce");
          }
        }
        break;
      }
      default: {
        std::vector<std::vector<float>> parts(static_cast<size_t>(world),
                                              std::vector<float>(static_cast<size_t>(n + 1)));
        std::vector<void*> pointers;
        for (auto& part : parts) pointers.push_back(part.data());
        for (int64_t i = 0; i < n; ++i) data[i] = value(call, rank, i);
        comm.gather(data, n * 4, pointers.data(), root, deadline, DType::f32);
        if (rank == root) {
          for (int r = 0; r < world; ++r) {
            for (int64_t i = 0; i < n; ++i)
              EXPECT(parts[static_cast<size_t>(r)][static_cast<size_t>(i)] == value(call, r, i), "gather");
          }
        }
        std::vector<float> back(static_cast<size_t>(n + 1));
        comm.scatter(const_cast<const void* const*>(pointers.data()), n * 4, back.data(), root, deadline, DType::f32);
        for (int64_t i = 0; i < n; ++i) EXPECT(back[static_cast<size_t>(i)] == value(call, rank, i), "scatter");
        comm.barrier(deadline);
      }
    }
  }
  comm.barrier(Deadline::after(std::chrono::seconds(60)));
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 4) {
    std::fprintf(stderr, "usage: %s WORLD CALLS SEED [nostall]\n", argv[0]);
    return 2;
  }
  world = std::atoi(argv[1]);
  num_calls = std::atoi(argv[2]);
  seed = static_cast<unsigned>(std::atoi(argv[3]));
  if (argc < 5) Communicator::set_stall(stall);
  auto meshes = Mesh::in_process(world, Communicator::segment_bytes(world));
  std::vector<std::thread> ranks;
  for (auto& mesh : meshes) ranks.emplace_back(run_rank, std::move(mesh));
  for (auto& rank : ranks) rank.join();
  std::printf("%d ranks, %d calls: ok\n", world, num_calls);
}
