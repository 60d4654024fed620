// What a group's links and matmuls reach: measured on all ranks at once, and the same numbers on all of them.

#include <algorithm>
#include <cmath>
#include <limits>

#include <ATen/ATen.h>

#include "comm/hosts.h"
#include "comm/tensors.h"
#include "pypar/signal.h"

namespace pypar {

namespace {

constexpr int64_t kLinkBytes = 4 << 20;  // out of each host; a burst of a shaped link is a fraction of it
constexpr int kPings = 16;
constexpr int kRepeats = 2;
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
  at::Tensor slowest = at::zeros({6}, at::kDouble);
  auto* times = slowest.data_ptr<double>();
  auto shift = [&](int64_t bytes, const char* what) {  // each host sends to the next one
    at::Tensor from = at::zeros({bytes}, at::kByte), to = at::empty({bytes}, at::kByte);
    barrier(deadline);
    return seconds([&] {
      if (!inner_.across) return;
      finish(what, deadline, [&] {
        std::vector<int64_t> sends(static_cast<size_t>(num_hosts), 0), receives = sends;
        sends[static_cast<size_t>((host_ + 1) % num_hosts)] = bytes;
        receives[static_cast<size_t>((host_ + num_hosts - 1) % num_hosts)] = bytes;
        c10d::AllToAllOptions options;
        options.timeout = time_left(deadline);
        return inner_.across->alltoall_base(to, from, receives, sends, options);
      });
    });
  };
  times[0] = times[1] = std::numeric_limits<double>::max();
  for (int i = 0; i < kPings; ++i) times[0] = std::min(times[0], shift(8, "the latency of calibrate"));
  for (int i = 0; i < kRepeats; ++i) times[1] = std::min(times[1], shift(kLinkBytes / lanes, "calibrate"));
  barrier(deadline);
  times[2] = matmul_time(at::kFloat);
  times[3] = matmul_time(at::kDouble);
  times[4] = matmul_time(at::kBFloat16);
  times[5] = matmul_time(at::kHalf);
  all_reduce(slowest, ReduceOp::max, deadline);
  return {rounded(times[0]),     rounded(kLinkBytes / std::max(1e-9, times[1] - times[0])),
          rounded(1 / times[2]), rounded(1 / times[3]),
          rounded(1 / times[4]), rounded(1 / times[5])};
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
