// What the links between hosts and the matmuls of a group reach, as all its ranks agreed.
#pragma once

namespace pypar {

struct Calibration {
  double latency_s = 0;    // of a small message from host to host
  double bytes_per_s = 0;  // out of a host, while as much comes in
  double chunk_s = 0;      // that one more chunk costs beside a matmul
  double wire_cpu = 0;     // share of the wire's time that the transport takes from cores that multiply
  // Of one rank's matmul, floating-point operations per second.
  double float32_flops = 0;
  double float64_flops = 0;
  double bfloat16_flops = 0;
  double float16_flops = 0;
};

}  // namespace pypar
