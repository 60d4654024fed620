// What a group's links and matmuls reach: measured on all ranks at once, and the same numbers on all of them.
//
// All of it with the rows of all_gather_rows, as the fused matmuls move them: alone for the wire, beside a matmul for
// what the transport takes from the cores that multiply. docs/design/0006 has the arithmetic.

#include <algorithm>
#include <cmath>
#include <ctime>
#include <limits>

#include <ATen/ATen.h>

#include "comm/call.h"
#include "comm/hosts.h"
#include "comm/tensors.h"
#include "pypar/signal.h"

namespace pypar {

namespace {

constexpr int64_t kWidth = 256;  // of a row, float32
constexpr int64_t kRowBytes = kWidth * 4;
constexpr int64_t kFewestRows = 512, kMostRows = 4096;  // of a host; a burst of a shaped link is a fraction
constexpr int kPings = 16, kRepeats = 3, kRounds = 8;
// Beside a matmul.
constexpr double kWireS = 8e-3;        // of the rows, where there are enough
constexpr double kMatmulOverWire = 2;  // the own host's rows alone outlast the wire
constexpr int kFewChunks = 2, kManyChunks = 8;
// Odd sizes multiply at half the speed.
constexpr int64_t kBlockRows = 64, kColumnUnit = 64, kRowUnit = 16 * kManyChunks;
constexpr int64_t kMatmulRows = 256, kMatmulCols = 512;

// Coarse on purpose, so that two runs on one machine come to the same: steps of 2^(1/4).
double rounded(double value) {
  return std::exp2(std::round(std::log2(value) * 4) / 4);
}

template <typename Run>
double seconds(Run&& run) {
  const uint64_t start = now_ns();
  run();
  return std::max(1e-9, static_cast<double>(now_ns() - start) * 1e-9);
}

// Of all threads of this process.
double cpu_seconds() {
  timespec now{};
  clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &now);
  return static_cast<double>(now.tv_sec) + 1e-9 * static_cast<double>(now.tv_nsec);
}

// The lower quartile: other processes and a scheduler's bad luck only ever add.
double typical(std::vector<double> values) {
  const auto at = values.begin() + static_cast<std::ptrdiff_t>(values.size() / 4);
  std::nth_element(values.begin(), at, values.end());
  return *at;
}

// Seconds per operation.
double matmul_time(at::ScalarType type) {
  const auto a = at::ones({kMatmulRows, kMatmulCols}, type), b = at::ones({kMatmulCols, kMatmulCols}, type);
  auto out = at::mm(a, b.t());
  double best = std::numeric_limits<double>::max();
  for (int i = 0; i < kRepeats; ++i) best = std::min(best, seconds([&] { at::mm_out(out, a, b.t()); }));
  return best / (2.0 * kMatmulRows * kMatmulCols * kMatmulCols);
}

}  // namespace

Calibration Hosts::measure(Deadline deadline) {
  at::NoGradGuard no_grad;
  const auto num_hosts = static_cast<int64_t>(hosts_.size());
  int64_t most_ranks = 1;  // on a host
  for (const auto& host : hosts_) most_ranks = std::max(most_ranks, static_cast<int64_t>(host.size()));
  const at::Tensor own = at::zeros({kMostRows, kWidth}, at::kFloat);
  auto gather = [&](int64_t rows, int num_chunks, const Communicator::ConsumeRows& consume) {  // rows: of each rank
    const std::vector<int64_t> counts(static_cast<size_t>(size_), rows);
    barrier(deadline);
    return seconds([&] { all_gather_rows(own.data_ptr(), counts, kWidth, num_chunks, consume, deadline, DType::f32); });
  };
  auto nothing = [](int, int64_t, int64_t, const void*) {
  };
  // Of the slowest rank, so that all of them come to the same, also to the same sizes below.
  at::Tensor slowest = at::zeros({8}, at::kDouble);
  auto* times = slowest.data_ptr<double>();
  times[0] = times[1] = std::numeric_limits<double>::max();
  for (int i = 0; i < kPings; ++i) times[0] = std::min(times[0], gather(1, 1, nothing) / 2);  // they agree, then rows
  for (int i = 0; i < kRepeats; ++i) times[1] = std::min(times[1], gather(kMostRows / most_ranks, 1, nothing));
  times[1] = std::max(1e-9, times[1] - 2 * times[0]);
  barrier(deadline);
  times[2] = matmul_time(at::kFloat);
  times[3] = matmul_time(at::kDouble);
  times[4] = matmul_time(at::kBFloat16);
  times[5] = matmul_time(at::kHalf);
  all_reduce(slowest, ReduceOp::max, deadline);
  const double latency_s = times[0], most_bytes = static_cast<double>((num_hosts - 1) * kMostRows * kRowBytes);
  const double bytes_per_s = most_bytes / times[1];

  // The same rows alone, a matmul alone, and both at once in few and in many chunks.
  const double far_row_s = static_cast<double>((num_hosts - 1) * kRowBytes) / bytes_per_s;
  const int64_t host_rows = std::clamp(static_cast<int64_t>(kWireS / far_row_s), kFewestRows, kMostRows);
  const int64_t per_rank = host_rows / most_ranks, rows = std::max(kRowUnit, per_rank / kRowUnit * kRowUnit);
  const double row_flop_s = 2.0 * static_cast<double>(kWidth) * times[2];  // of one row and one column
  const double columns = kMatmulOverWire * static_cast<double>(rows * most_ranks) * far_row_s /
                         (row_flop_s * static_cast<double>(rows * size_));
  const int64_t units = std::clamp(static_cast<int64_t>(std::lround(columns / kColumnUnit)), int64_t{1}, int64_t{128});
  const at::Tensor w = at::zeros({units * kColumnUnit, kWidth}, at::kFloat);
  const at::Tensor y = at::empty({kBlockRows, w.size(0)}, at::kFloat);
  // In blocks, so that it takes as long however the rows are cut.
  auto multiply = [&](int, int64_t, int64_t num, const void* data) {
    for (int64_t first = 0; first < num; first += kBlockRows) {
      const int64_t n = std::min(kBlockRows, num - first);
      at::Tensor out = y.narrow(0, 0, n);
      at::mm_out(out, at::from_blob(const_cast<std::byte*>(offset(data, first * kRowBytes)), {n, kWidth}, at::kFloat),
                 w.t());
    }
  };
  auto alone = [&] {  // and until all ranks have done it, as in a gather
    barrier(deadline);
    return seconds([&] {
      for (int r = 0; r < size_; ++r) multiply(r, 0, rows, own.data_ptr());
      barrier(deadline);
    });
  };
  alone();
  std::vector<double> matmul, few, many, cpu;
  for (int i = 0; i < kRounds; ++i) {
    matmul.push_back(alone());
    few.push_back(gather(rows, kFewChunks, multiply));
    many.push_back(gather(rows, kManyChunks, multiply));
    barrier(deadline);
    const double before = cpu_seconds();
    gather(rows, 1, nothing);
    cpu.push_back(cpu_seconds() - before);
  }
  at::Tensor beside = at::zeros({4}, at::kDouble);
  auto* costs = beside.data_ptr<double>();
  costs[0] = typical(matmul), costs[1] = typical(few), costs[2] = typical(many), costs[3] = typical(cpu);
  all_reduce(beside, ReduceOp::max, deadline);
  const double chunk_s = std::max(latency_s / 2, (costs[2] - costs[1]) / (kManyChunks - kFewChunks));
  // What the matmul lost, which other processes disturb, and never more than the transport computes: cores that have
  // nothing else to do take that, where there are any.
  const double lost_s = std::min(costs[1] - costs[0] - kFewChunks * chunk_s, costs[3]);
  const double wire_cpu = lost_s / (static_cast<double>(rows * most_ranks) * far_row_s);

  Calibration agreed;
  agreed.latency_s = rounded(latency_s);
  agreed.bytes_per_s = rounded(bytes_per_s);
  agreed.chunk_s = rounded(chunk_s);
  agreed.wire_cpu = std::round(std::clamp(wire_cpu, 0.0, 1.0) * 8) / 8;
  agreed.float32_flops = rounded(1 / times[2]);
  agreed.float64_flops = rounded(1 / times[3]);
  agreed.bfloat16_flops = rounded(1 / times[4]);
  agreed.float16_flops = rounded(1 / times[5]);
  return agreed;
}

Calibration Hosts::calibration(Deadline deadline) {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    if (calibration_) return *calibration_;
  }
  const Calibration measured = measure(deadline);
  std::lock_guard<std::mutex> lock(mutex_);
  return calibration_.emplace(measured);
}

void Hosts::set_calibration(const std::optional<Calibration>& calibration) {
  std::lock_guard<std::mutex> lock(mutex_);
  calibration_ = calibration;
}

}  // namespace pypar
