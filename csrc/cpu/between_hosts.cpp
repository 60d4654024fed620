#include "cpu/between_hosts.h"

namespace pypar {

double flops_of(const Calibration& calibration, at::ScalarType type) {
  switch (type) {
    case at::kDouble: return calibration.float64_flops;
    case at::kBFloat16: return calibration.bfloat16_flops;
    case at::kHalf: return calibration.float16_flops;
    default: return calibration.float32_flops;
  }
}

double flop_of(at::TensorList xs, int64_t N) {
  double flop = 0;
  for (const at::Tensor& x : xs) flop += 2.0 * static_cast<double>(x.numel() * N);
  return flop;
}

int num_chunks_of(Hosts& hosts, int64_t asked, Overlap overlap, int64_t rows, int64_t row_bytes, double flop,
                  at::ScalarType type, Deadline deadline) {
  TORCH_CHECK_VALUE(asked >= 0 && asked <= 4096, "num_chunks is ", asked, ", expected 0 (decide) to 4096");
  if (asked != 0) return static_cast<int>(asked);
  const Calibration calibration = hosts.calibration(deadline);
  return decide({overlap, rows, row_bytes, flop, flops_of(calibration, type), hosts.num_hosts(), calibration.latency_s,
                 calibration.bytes_per_s, calibration.chunk_s, calibration.wire_cpu})
      .num_chunks;
}

Sums::Sums(const Hosts& hosts, at::Tensor y) : y_(std::move(y)) {
  const bool half = y_.scalar_type() == at::kHalf || y_.scalar_type() == at::kBFloat16;
  wide_ = half && hosts.adds_locally() ? at::empty(y_.sizes(), y_.options().dtype(at::kFloat)) : y_;
}

std::optional<at::Tensor> Sums::cast(const std::optional<at::Tensor>& more) const {
  return more.has_value() && more->defined() ? more->to(wide_.scalar_type()) : more;
}

void Sums::store() {
  if (!wide_.is_same(y_)) y_.copy_(wide_);
}

}  // namespace pypar
