// What a group's links and matmuls reach: measured on all ranks at once, and the same numbers on all of them.

#include <algorithm>
#include <cmath>
#include <ctime>
#include <limits>

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include "comm/hosts.h"
#include "comm/tensors.h"
#include "pypar/signal.h"

namespace pypar {

namespace {

constexpr int64_t kLinkBytes = 4 << 20;  // out of each host; a burst of a shaped link is a fraction of it
constexpr int kPings = 16;
constexpr int kRepeats = 2;
constexpr int kChunks = 8;
constexpr int64_t kChunkBytes = 64 << 10;
constexpr int64_t kMatmulRows = 256, kMatmulCols = 512;

// Coarse on purpose, so that two runs on one machine come to the same: steps of 2^(1/4).
double rounded(double value) {
  return std::exp2(std::round(std::log2(value) * 4) / 4);
}

// Of all threads of this process.
double cpu_seconds() {
  timespec now{};
  clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &now);
  return static_cast<double>(now.tv_sec) + 1e-9 * static_cast<double>(now.tv_nsec);
}

template <typename Run>
double seconds(Run&& run) {
  const uint64_t start = now_ns();
  run();
  return std::max(1e-9, static_cast<double>(now_ns() - start) * 1e-9);
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
  const auto num_hosts = static_cast<int>(hosts_.size());
  const int lanes = equal_ ? local_.world() : 1;  // links that a host uses at once
  // Of the slowest rank, so that all of them come to the same.
  at::Tensor slowest = at::zeros({8}, at::kDouble);
  auto* times = slowest.data_ptr<double>();
  at::Tensor from = at::zeros({kLinkBytes}, at::kByte), to = at::empty({kLinkBytes}, at::kByte);
  auto shift = [&](int64_t bytes, const std::function<void()>& meanwhile) {  // each host sends to the next one
    if (!inner_.across) return meanwhile ? meanwhile() : void();
    std::vector<int64_t> sends(static_cast<size_t>(num_hosts), 0), receives = sends;
    sends[static_cast<size_t>((host_ + 1) % num_hosts)] = bytes;
    receives[static_cast<size_t>((host_ + num_hosts - 1) % num_hosts)] = bytes;
    at::Tensor input = from.narrow(0, 0, bytes), output = to.narrow(0, 0, bytes);
    swap(*inner_.across, output, receives, input, sends, deadline, meanwhile);
  };
  times[0] = times[1] = std::numeric_limits<double>::max();
  for (int i = 0; i < kPings; ++i) {
    barrier(deadline);
    times[0] = std::min(times[0], seconds([&] { shift(8, nullptr); }));
  }
  double cpu_s = 0;
  for (int i = 0; i < kRepeats; ++i) {
    barrier(deadline);
    const double before = cpu_seconds();
    const double wall_s = seconds([&] { shift(kLinkBytes / lanes, nullptr); });
    if (wall_s >= times[1]) continue;
    times[1] = wall_s, cpu_s = cpu_seconds() - before;
  }
  // Idle cores take the transport's work; where there are too few of them, the matmuls wait.
  const int computing = local_.world() * at::get_num_threads();
  const bool spare = local_.mesh().num_cores >= computing + local_.world();
  times[7] = spare ? 0 : std::min(1.0, cpu_s / times[1]);
  barrier(deadline);
  times[2] = matmul_time(at::kFloat);
  times[3] = matmul_time(at::kDouble);
  times[4] = matmul_time(at::kBFloat16);
  times[5] = matmul_time(at::kHalf);
  const auto a = at::ones({kMatmulRows, kMatmulCols}, at::kFloat), b = at::ones({kMatmulCols, kMatmulCols}, at::kFloat);
  at::Tensor out = at::mm(a, b);
  barrier(deadline);
  const double busy_s = seconds([&] {
    for (int i = 0; i < kChunks; ++i) shift(kChunkBytes / lanes, [&] { at::mm_out(out, a, b); });
  });
  const double matmul_s = times[2] * 2.0 * kMatmulRows * kMatmulCols * kMatmulCols;
  times[6] = std::max(times[0] / 2, busy_s / kChunks - matmul_s);
  all_reduce(slowest, ReduceOp::max, deadline);
  Calibration agreed;
  agreed.latency_s = rounded(times[0]);
  agreed.bytes_per_s = rounded(kLinkBytes / std::max(1e-9, times[1] - times[0]));
  agreed.chunk_s = rounded(times[6]);
  agreed.wire_cpu = std::round(times[7] * 8) / 8;
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
