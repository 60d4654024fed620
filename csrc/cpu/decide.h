// Which form a fused matmul takes over ranks that share no memory: a pure function of sizes and of numbers that all
// ranks agreed on, so that all ranks come to the same. The arithmetic is in docs/design/0006.
#pragma once

#include <cstdint>

#include "comm/calibration.h"

namespace pypar {

enum class Overlap { gather, scatter, reduce };  // what travels: rows before the matmul, after it, or both ways after

struct Problem {
  Overlap overlap;
  int64_t rows;       // of the whole product, over all ranks
  int64_t row_bytes;  // of what travels
  double flop;        // of one rank's matmul
  double flop_per_s;  // that it reaches
  int num_hosts;
  double latency_s;
  double bytes_per_s;
  double chunk_s;
  double wire_cpu;
};

struct Decision {
  int num_chunks;  // 1: whole, the rows travel all at once
  double matmul_s;
  double wire_s;
  double whole_s;    // the op, whole
  double chunked_s;  // the op in its best number of chunks; whole_s where no number is allowed
};

Decision decide(const Problem& problem);

}  // namespace pypar
