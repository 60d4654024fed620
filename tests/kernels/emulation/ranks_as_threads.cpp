// The kernels of csrc/cuda with ranks as threads of one process, and no torch: for the sanitizers, and for finding out
// whether a mistake in the protocol is noticed. Called as: program scenario world calls.
//
// Every call has another payload and size, and every rank checks every number of its result. Exit status 1: a wrong
// number or a wrong end; what the sanitizers find has theirs.

#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "cuda/all_gather.cuh"
#include "cuda/all_reduce_multimem.cuh"
#include "cuda/ring_recv.cuh"
#include "cuda/zero_scatter.cuh"
#include "cuda/zero_step.cuh"
#include "pypar/launch.cuh"

using namespace pypar;

namespace {

using Bf16 = __nv_bfloat16;

std::atomic<int> failures = 0;
int64_t multicast = 0;  // of the channels' memory

void expect(bool holds, const char* what, int rank, uint32_t call, int64_t i) {
  if (!holds && failures++ < 5) std::printf("WRONG %s on rank %d, call %u, at %ld\n", what, rank, call, (long)i);
}

// Numbers whose float32 sums depend on their order.
float number(uint32_t call, int rank, int64_t i) {
  uint32_t h = call * 2654435761u ^ static_cast<uint32_t>(rank) * 40503u ^ static_cast<uint32_t>(i) * 2246822519u;
  h = (h ^ h >> 15) * 2246822519u;
  h ^= h >> 13;
  return static_cast<float>(static_cast<int32_t>(h)) * 1e-9f * (h % 7 == 0 ? 1000.0f : 1.0f);
}

template <typename T>
std::vector<T> payload(uint32_t call, int rank, int64_t n) {
  std::vector<T> x(static_cast<size_t>(n));
  for (int64_t i = 0; i < n; ++i) x[static_cast<size_t>(i)] = Element<T>::narrow(number(call, rank, i));
  return x;
}

template <typename T>
float expected_sum(uint32_t call, int world, int64_t i) {
  float sum = Element<T>::widen(Element<T>::narrow(number(call, 0, i)));
  for (int r = 1; r < world; ++r) sum += Element<T>::widen(Element<T>::narrow(number(call, r, i)));
  return sum;
}

template <typename T>
bool same(T a, T b) {
  return std::memcmp(&a, &b, sizeof(T)) == 0;
}

constexpr int64_t kSlotBytes = 1 << 14;
const dim3 kGrid(2), kBlock(8);  // few threads, each with several rounds: the sanitizers are slow

struct World {
  int world;
  std::vector<std::shared_ptr<char>> memory;
  std::vector<int64_t> pointers;

  explicit World(int num) : world(num) {
    const size_t bytes = static_cast<size_t>(slots_offset(num) + 2 * kSlotBytes);
    for (int r = 0; r < num; ++r) {
      memory.emplace_back(new (std::align_val_t(256)) char[bytes](),
                          [](char* p) { ::operator delete[](p, std::align_val_t(256)); });
      pointers.push_back(reinterpret_cast<int64_t>(memory.back().get()));
    }
    multicast = emulation::add_multicast(pointers.data(), num, static_cast<int64_t>(bytes));
  }
  Channel channel(int rank, uint32_t* report, double timeout_s = 10) const {
    return {pointers.data(), rank, world, kSlotBytes, static_cast<uint64_t>(timeout_s * 1e9), report};
  }
};

int64_t numel_of(uint32_t call, int world) {
  const int64_t sizes[] = {129, 0, 1, 64, 257, world - 1, world + 1};
  return sizes[call % 7];
}

Cuts cuts_of(int64_t numel, int world, uint32_t call) {
  Cuts cuts{};
  for (int r = 0; r < world; ++r) {
    cuts.begin[r + 1] = r + 1 == world ? numel : numel * (r + static_cast<int>(call % 2)) / world;
  }
  return cuts;
}

template <typename T>
void all_reduce(void (*kernel)(AllReduceParams), const Channel& channel, uint32_t call) {
  const int64_t n = numel_of(call, channel.world);
  const std::vector<T> x = payload<T>(call, channel.rank, n);
  std::vector<T> out(x.size());
  launch(kernel, kGrid, kBlock, 0, nullptr, AllReduceParams{x.data(), out.data(), n, Reduction::sum, channel}, true);
  for (int64_t i = 0; i < n; ++i) {
    const T y = Element<T>::narrow(expected_sum<T>(call, channel.world, i));
    expect(same(out[static_cast<size_t>(i)], y), "sum", channel.rank, call, i);
  }
}

void one_shot(const Channel& channel, uint32_t call) {
  if (call % 2 == 0) return all_reduce<float>(one_shot_all_reduce<float>, channel, call);
  all_reduce<Bf16>(one_shot_all_reduce<Bf16>, channel, call);
}

void two_shot(const Channel& channel, uint32_t call) {
  if (call % 2 == 0) return all_reduce<float>(two_shot_all_reduce<float>, channel, call);
  all_reduce<Bf16>(two_shot_all_reduce<Bf16>, channel, call);
}

// In an order that is the switch's own: within the error of any.
template <typename T>
void multimem_of(const Channel& channel, uint32_t call, float epsilon) {
  const int64_t n = numel_of(call, channel.world);
  const std::vector<T> x = payload<T>(call, channel.rank, n);
  std::vector<T> out(x.size());
  const AllReduceParams params{x.data(), out.data(), n, Reduction::sum, channel};
  launch(multimem_all_reduce<T>, kGrid, kBlock, 0, nullptr, MultimemParams{params, multicast}, true);
  for (int64_t i = 0; i < n; ++i) {
    double sum = 0, size = 0;
    for (int r = 0; r < channel.world; ++r) {
      const double x_r = Element<T>::widen(Element<T>::narrow(number(call, r, i)));
      sum += x_r, size += std::abs(x_r);
    }
    const double error = std::abs(Element<T>::widen(out[static_cast<size_t>(i)]) - sum);
    expect(error <= epsilon * std::abs(sum) + 1e-6 * size, "sum", channel.rank, call, i);
  }
}

void multimem(const Channel& channel, uint32_t call) {
  if (call % 2 == 0) return multimem_of<float>(channel, call, 0);
  multimem_of<Bf16>(channel, call, 0.004f);
}

void reduce_scatter(const Channel& channel, uint32_t call) {
  const int64_t n = numel_of(call, channel.world);
  const Cuts cuts = cuts_of(n, channel.world, call);
  const std::vector<float> x = payload<float>(call, channel.rank, n);
  std::vector<float> out(static_cast<size_t>(cuts.num(channel.rank)));
  const ReduceScatterParams params{x.data(), out.data(), cuts, Reduction::sum, channel};
  launch(reduce_scatter_kernel<float>, kGrid, kBlock, 0, nullptr, params, true);
  for (int64_t i = 0; i < cuts.num(channel.rank); ++i) {
    const float y = expected_sum<float>(call, channel.world, cuts.begin[channel.rank] + i);
    expect(same(out[static_cast<size_t>(i)], y), "sum", channel.rank, call, i);
  }
}

void check_gathered(const Channel& channel, const float* full, const Cuts& cuts, uint32_t call) {
  for (int r = 0; r < channel.world; ++r) {
    for (int64_t i = 0; i < cuts.num(r); ++i) {
      expect(same(full[cuts.begin[r] + i], number(call, r, i)), "shard", channel.rank, call, i);
    }
  }
}

void all_gather(const Channel& channel, uint32_t call) {
  const int64_t n = numel_of(call, channel.world);
  const Cuts cuts = cuts_of(n, channel.world, call);
  const std::vector<float> shard = payload<float>(call, channel.rank, cuts.num(channel.rank));
  std::vector<float> full(static_cast<size_t>(n));
  launch(all_gather_kernel<float>, kGrid, kBlock, 0, nullptr, AllGatherParams{shard.data(), full.data(), cuts, channel},
         true);
  check_gathered(channel, full.data(), cuts, call);
}

// Read where the copies arrive.
void copied(const Channel& channel, uint32_t call) {
  const Cuts cuts = cuts_of(numel_of(call, channel.world), channel.world, call);
  const std::vector<float> shard = payload<float>(call, channel.rank, cuts.num(channel.rank));
  const auto bytes = static_cast<int64_t>(shard.size() * sizeof(float));
  push_by_copies(channel, shard.data(), cuts.begin[channel.rank] * 4, bytes, channel.pointers, nullptr);
  launch(wait_kernel, dim3(1), kBlock, 0, nullptr, channel, true);
  const char* slot = first_slot(channel, channel.pointers[channel.rank]);
  check_gathered(channel, reinterpret_cast<const float*>(slot), cuts, call);
  launch(finish_kernel, dim3(1), dim3(1), 0, nullptr, channel, false);
}

void zero_scatter(const Channel& channel, uint32_t call) {
  const int64_t n = numel_of(call, channel.world);
  const Cuts cuts = cuts_of(n, channel.world, call);
  const std::vector<Bf16> x = payload<Bf16>(call, channel.rank, n);
  std::vector<float> shard(static_cast<size_t>(cuts.num(channel.rank)), 1.0f);
  double partial[2] = {}, squares = -1, expected_squares = 0;
  const ZeroScatterParams params{x.data(), shard.data(), partial, &squares, cuts, 0.5f, true, channel};
  launch(zero_scatter_kernel<Bf16>, kGrid, kBlock, kBlock.x * sizeof(double), nullptr, params, true);
  for (size_t i = 0; i < shard.size(); ++i) {
    const int64_t at = cuts.begin[channel.rank] + static_cast<int64_t>(i);
    const float y = expected_sum<Bf16>(call, channel.world, at) * 0.5f + 1.0f;
    expect(same(shard[i], y), "shard", channel.rank, call, at);
    expected_squares += static_cast<double>(y) * y;
  }
  expect(std::abs(squares - expected_squares) <= 1e-12 * expected_squares, "squares", channel.rank, call, 0);
}

void zero_step(const Channel& channel, uint32_t call) {
  const int64_t n = numel_of(call, channel.world);
  const Cuts cuts = cuts_of(n, channel.world, call);
  const std::vector<Bf16> grad = payload<Bf16>(call, channel.rank, n);
  const size_t num = static_cast<size_t>(cuts.num(channel.rank));
  std::vector<float> param(num, 1.0f), m(num, 0.0f), v(num, 0.0f);
  std::vector<Bf16> low(num);
  // Without decay and with these moments a first step is the sign of the gradient, whatever its size.
  const AdamWFactors factors{1, 0, 0.99f, 1e-20f, 0.1f, 0.01f, 1, 0.1f, 1, true, false};
  const ZeroStepParams params{param.data(), m.data(), v.data(), nullptr, grad.data(),
                              low.data(),   nullptr,  cuts,     factors, channel};
  launch(zero_step_kernel<Bf16>, kGrid, kBlock, 0, nullptr, params, true);
  for (size_t i = 0; i < num; ++i) {
    const float sum = expected_sum<Bf16>(call, channel.world, cuts.begin[channel.rank] + static_cast<int64_t>(i));
    expect(same(m[i], sum * 0.1f), "moment", channel.rank, call, static_cast<int64_t>(i));
    const float step = sum == 0 ? 0.0f : sum > 0 ? -0.1f : 0.1f;
    expect(std::abs(param[i] - (1 + step)) < 1e-5f, "param", channel.rank, call, static_cast<int64_t>(i));
    expect(same(low[i], Element<Bf16>::narrow(param[i])), "low", channel.rank, call, static_cast<int64_t>(i));
  }
}

void send_message(const Channel& channel, int peer, uint32_t call) {
  const int64_t n = numel_of(call, channel.world);
  const std::vector<float> x = payload<float>(call, channel.rank, n);
  RingSendParams send{Ring{channel, peer, call, 3}, {}};
  send.header.ndim = 1, send.header.sizes[0] = n;
  send_by_copy(send, channel.pointers[peer], x.data(), static_cast<int64_t>(x.size() * sizeof(float)), nullptr);
}

void receive_message(const Channel& channel, int peer, uint32_t call) {
  const int64_t n = numel_of(call, channel.world);
  RingHeader header{};
  const Ring ring{channel, peer, call, 3};
  launch(ring_wait_kernel, dim3(1), dim3(1), 0, nullptr, RingRecvParams{ring, &header}, true);
  const char* slot = reinterpret_cast<const char*>(channel.pointers[channel.rank]) + ring.offset();
  expect(header.sizes[0] == n, "size", channel.rank, call, header.sizes[0]);
  for (int64_t i = 0; i < n; ++i) {
    float y;
    std::memcpy(&y, slot + sizeof(RingHeader) + 4 * i, 4);
    expect(same(y, number(call, peer, i)), "message", channel.rank, call, i);
  }
  launch(ring_credit_kernel, dim3(1), dim3(1), 0, nullptr, RingRecvParams{ring, nullptr}, false);
}

// Every rank sends to the next and receives from the one before, through three slots.
void ring(const Channel& channel, uint32_t call) {
  send_message(channel, (channel.rank + 1) % channel.world, call);
  receive_message(channel, (channel.rank + channel.world - 1) % channel.world, call);
}

// So that who may run ahead does.
void be_late() {
  std::this_thread::sleep_for(std::chrono::milliseconds(5));
}

// Rank 0 only sends, rank 1 only receives: nothing but credits keeps the one from overtaking the other.
void pipe(const Channel& channel, uint32_t call) {
  if (channel.rank == 0) send_message(channel, 1, call);
  if (channel.rank == 1) be_late(), receive_message(channel, 0, call);
}

// Rank 0 gives to all, and waits for nobody's data. In the collectives every rank waits for every other in each call,
// so that no one is two calls ahead; here nothing but the gate sees to that.
struct OneWayParams {
  const float* x;
  float* out;
  int64_t num;
  Channel channel;
};

void one_way_kernel(OneWayParams p) {
  const Channel& channel = p.channel;
  const uint32_t call = this_call(channel);
  const int block = static_cast<int>(blockIdx.x);
  const Run run = part_of<float>(p.num, block, static_cast<int>(gridDim.x));
  if (channel.rank == 0) {
    gate(channel, call);
    for (int peer = 1; peer < channel.world; ++peer) {
      copy_run(slot_of<float>(channel, peer, call) + run.begin, p.x + run.begin, run.num);
    }
    publish(channel, block, call);
  } else {
    if (threadIdx.x == 0) {
      wait_flag(channel, full_flag(channel, channel.rank, 0, block, call), call, kNoData, 0, block, call);
    }
    __syncthreads();
    copy_run(p.out + run.begin, slot_of<float>(channel, channel.rank, call) + run.begin, run.num);
  }
  finish(channel, call);
}

void one_way(const Channel& channel, uint32_t call) {
  const int64_t n = numel_of(call, channel.world);
  const std::vector<float> x = payload<float>(call, 0, n);
  std::vector<float> out(x.size());
  if (channel.rank != 0) be_late();
  launch(one_way_kernel, kGrid, kBlock, 0, nullptr, OneWayParams{x.data(), out.data(), n, channel}, true);
  if (channel.rank == 0) return;
  for (size_t i = 0; i < x.size(); ++i)
    expect(same(out[i], x[i]), "number", channel.rank, call, static_cast<int64_t>(i));
}

using Scenario = void (*)(const Channel&, uint32_t);
const std::map<std::string, Scenario> kScenarios{
    {"one_shot", one_shot},     {"two_shot", two_shot}, {"reduce_scatter", reduce_scatter},
    {"all_gather", all_gather}, {"copied", copied},     {"zero_scatter", zero_scatter},
    {"zero_step", zero_step},   {"ring", ring},         {"pipe", pipe},
    {"one_way", one_way},       {"multimem", multimem},
};

// The last rank makes no second call. Rank 0 gives up after 0.3 s, the others would wait for long; all must end with an
// error that names the last one, and write nothing.
void absent(const Channel& given, uint32_t* report) {
  const int culprit = given.world - 1;
  two_shot(given, 1);
  if (given.rank == culprit) return;
  Channel channel = given;
  channel.timeout_ns = given.rank == 0 ? 300'000'000ull : 5'000'000'000ull;
  std::vector<float> x(64, 1.0f), out(64, -77.0f);
  bool is_ended = false;
  try {
    launch(two_shot_all_reduce<float>, kGrid, kBlock, 0, nullptr,
           AllReduceParams{x.data(), out.data(), 64, Reduction::sum, channel}, true);
  } catch (const std::runtime_error&) {
    is_ended = true;
  }
  expect(is_ended, "end: no error", channel.rank, 2, 0);
  for (float y : out) expect(y == -77.0f, "out: written", channel.rank, 2, 0);
  expect(report[0] == (channel.rank == 0 ? kNoData : kStopped), "report: code", channel.rank, 2, report[0]);
  expect(report[1] == static_cast<uint32_t>(culprit), "report: rank", channel.rank, 2, report[1]);
  if (channel.rank != 0) return;
  const uint32_t* words = reinterpret_cast<const uint32_t*>(channel.pointers[0]);
  expect(words[kError] == kNoData && words[kErrorRank] == static_cast<uint32_t>(culprit) && words[kErrorCall] == 2,
         "error word", 0, 2, words[kError]);
}

}  // namespace

int main(int count, char** arguments) {
  if (count != 4) return 2;
  const std::string name = arguments[1];
  const int num = std::atoi(arguments[2]);
  const uint32_t calls = static_cast<uint32_t>(std::atoi(arguments[3]));
  const World world(num);
  std::vector<std::thread> ranks;
  std::vector<std::vector<uint32_t>> reports(static_cast<size_t>(num), std::vector<uint32_t>(4));
  for (int r = 0; r < num; ++r) {
    ranks.emplace_back([&, r] {
      uint32_t* report = reports[static_cast<size_t>(r)].data();
      try {
        const Channel channel = world.channel(r, report);
        if (name == "absent") return absent(channel, report);
        const Scenario scenario = kScenarios.at(name);
        for (uint32_t call = 1; call <= calls; ++call) scenario(channel, call);
      } catch (const std::exception& error) {
        std::printf("WRONG end of rank %d: %s, code %u, rank %u, call %u\n", r, error.what(), report[0], report[1],
                    report[3]);
        ++failures;
      }
    });
  }
  for (std::thread& rank : ranks) rank.join();
  return failures == 0 ? 0 : 1;
}
