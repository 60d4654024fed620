#include "cpu/decide.h"

#include <algorithm>

namespace pypar {

namespace {

constexpr int64_t kFewestRows = 48;  // below, a matmul is over before a second message is worth it
constexpr int64_t kChunkRows = 64;   // of a rank's matmul: smaller ones run slower
constexpr double kLeastGain = 1.05;
constexpr int kNumChunks[] = {2, 4, 8, 16, 32};

double chunked_time(const Problem& p, const Decision& d, double first_s, int num_chunks) {
  const double messages_s = first_s + num_chunks * p.chunk_s;
  const double busy_s = d.matmul_s + p.wire_cpu * d.wire_s;  // what the wire takes of the cores can't be hidden
  if (p.overlap == Overlap::reduce) {
    return std::max(busy_s, d.wire_s) + 1.5 * std::min(d.matmul_s, d.wire_s) / num_chunks + messages_s;
  }
  // The rows of the own host take part of the matmul and none of the wire.
  const double far_s = d.matmul_s * (p.num_hosts - 1) / p.num_hosts;
  return std::max(busy_s, d.wire_s + far_s / num_chunks) + messages_s;
}

}  // namespace

Decision decide(const Problem& p) {
  const double ways = p.overlap == Overlap::reduce ? 2 : 1;
  const double bytes = ways * (p.num_hosts - 1) / p.num_hosts * static_cast<double>(p.rows * p.row_bytes);
  Decision d{1, p.flop / p.flop_per_s, bytes / p.bytes_per_s, 0, 0};
  const double first_s = p.latency_s * (1 + ways);  // the ranks agree, then rows travel one way or both
  d.whole_s = d.chunked_s = d.matmul_s + d.wire_s + first_s;
  if (p.rows < kFewestRows || p.num_hosts < 2) return d;
  const int64_t rows = p.overlap == Overlap::reduce ? p.rows : p.rows / p.num_hosts;
  double best = 0;
  int best_chunks = 1;
  for (int n : kNumChunks) {
    if (rows < n * kChunkRows) break;
    const double time = chunked_time(p, d, first_s, n);
    if (best_chunks > 1 && time >= best) continue;
    best = time, best_chunks = n;
  }
  if (best_chunks == 1) return d;
  d.chunked_s = best;
  if (d.whole_s >= kLeastGain * best) d.num_chunks = best_chunks;
  return d;
}

}  // namespace pypar
