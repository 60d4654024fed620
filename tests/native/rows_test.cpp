// The collectives with a matmul at one end, ranks as threads of one process, so that ThreadSanitizer sees every access:
// a different payload in every call, uneven and empty shares, shares of several pieces, the gathered rows staged or in
// symmetric memory that is rewritten the moment a call is over, seeded stalls before each publish and each consume.
// usage: rows_test WORLD CALLS SEED

#include <cinttypes>
#include <cstdio>
#include <cstdlib>
#include <numeric>
#include <random>
#include <thread>
#include <vector>

#include "comm/communicator.h"

using namespace pypar;

namespace {

int world, num_calls;
unsigned seed;

void stall(int rank, uint32_t round) {
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

constexpr int64_t kWindowItems = 1'200'000;

void run_rank(std::unique_ptr<Mesh> mesh) {
  Communicator comm(std::move(mesh));
  const int rank = comm.rank();
  std::mt19937 random(seed);  // the same on every rank: the ranks make the same calls
  Segment memory = Segment::create(kWindowItems * sizeof(float));
  auto window = comm.rendezvous(memory.fd(), memory.data(), memory.bytes(), Deadline::after(std::chrono::seconds(60)));
  auto* symmetric = reinterpret_cast<float*>(memory.data());
  for (int call = 0; call < num_calls; ++call) {
    const auto deadline = Deadline::after(std::chrono::seconds(60));
    const int64_t widths[] = {1, 3, 64, 1000, 100000, 300000};
    const int64_t cols = widths[random() % 6];
    // Wide rows make shares of up to six pieces, and a rank that has all of them runs ahead of the others. The widest
    // don't fit in a slot.
    const int64_t most = cols == 300000 ? 3 : cols == 100000 ? 12 : 40;
    std::vector<int64_t> rows(static_cast<size_t>(world)), begins(static_cast<size_t>(world));
    for (auto& each : rows)
      each = random() % 3 == 0 ? 0 : static_cast<int64_t>(random() % static_cast<unsigned>(most + 1));
    std::exclusive_scan(rows.begin(), rows.end(), begins.begin(), int64_t{0});
    const int64_t total = begins.back() + rows.back(), mine = rows[static_cast<size_t>(rank)];
    const unsigned mode = random() % 3;
    const bool use_window = mode == 0 || (mode == 1 && rank == 0);
    const bool has_more = random() % 2;
    std::vector<float> residual(static_cast<size_t>(total * cols + 1), 5.0f);
    auto sum_at = [&](int64_t i) {
      float sum = 0;
      for (int r = 0; r < world; ++r) sum += value(call, r, i);
      return sum + (has_more ? 5.0f : 0.0f);
    };
    auto fill = [&](int64_t row, int64_t num, void* data) {
      for (int64_t i = 0; i < num * cols; ++i) static_cast<float*>(data)[i] = value(call, rank, row * cols + i);
    };
    Communicator::MoreRows more;
    if (has_more) {
      more = [&](int64_t begin, int64_t, std::vector<const void*>& srcs) {
        srcs.push_back(residual.data() + begin * cols);
      };
    }
    switch (random() % 3) {
      case 0: {
        std::vector<float> own(static_cast<size_t>(mine * cols + 1));
        float* in = use_window ? symmetric : own.data();
        fill(begins[static_cast<size_t>(rank)], mine, in);
        std::vector<int64_t> seen(static_cast<size_t>(world), 0);
        comm.all_gather_rows(
            in, rows.data(), cols,
            [&](int src, int64_t begin, int64_t num, const void* data) {
              EXPECT(begin == seen[static_cast<size_t>(src)], "rows of %d out of order", src);
              seen[static_cast<size_t>(src)] += num;
              const int64_t first = (begins[static_cast<size_t>(src)] + begin) * cols;
              for (int64_t i = 0; i < num * cols; ++i) {
                EXPECT(static_cast<const float*>(data)[i] == value(call, src, first + i), "all_gather_rows from %d",
                       src);
              }
            },
            deadline, DType::f32);
        EXPECT(seen == rows, "not every row was consumed once");
        if (use_window) fill(0, mine, symmetric);  // the buffer is this rank's again
        break;
      }
      case 1: {
        std::vector<float> out(static_cast<size_t>(mine * cols + 1));
        comm.reduce_scatter_rows(
            rows.data(), cols,
            [&](int dst, int64_t begin, int64_t num, void* data) {
              fill(begins[static_cast<size_t>(dst)] + begin, num, data);
            },
            out.data(), more, deadline, DType::f32);
        const int64_t first = begins[static_cast<size_t>(rank)] * cols;
        for (int64_t i = 0; i < mine * cols; ++i) {
          EXPECT(out[static_cast<size_t>(i)] == sum_at(first + i), "reduce_scatter_rows[%" PRId64 "]", i);
        }
        break;
      }
      default: {
        std::vector<float> out(static_cast<size_t>(total * cols + 1));
        comm.all_reduce_rows(total, cols, fill, out.data(), more, deadline, DType::f32);
        for (int64_t i = 0; i < total * cols; ++i) {
          EXPECT(out[static_cast<size_t>(i)] == sum_at(i), "all_reduce_rows[%" PRId64 "]", i);
        }
      }
    }
  }
  comm.barrier(Deadline::after(std::chrono::seconds(60)));
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 4) {
    std::fprintf(stderr, "usage: %s WORLD CALLS SEED\n", argv[0]);
    return 2;
  }
  world = std::atoi(argv[1]);
  num_calls = std::atoi(argv[2]);
  seed = static_cast<unsigned>(std::atoi(argv[3]));
  Communicator::set_stall(stall);
  auto meshes = Mesh::in_process(world, Communicator::segment_bytes(world));
  std::vector<std::thread> ranks;
  for (auto& mesh : meshes) ranks.emplace_back(run_rank, std::move(mesh));
  for (auto& rank : ranks) rank.join();
  std::printf("%d ranks, %d calls: ok\n", world, num_calls);
}
