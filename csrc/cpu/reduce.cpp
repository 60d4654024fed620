#include "cpu/reduce.h"

#include <cstdlib>
#include <cstring>
#include <string>

namespace pypar {

namespace plain {
void reduce(void* const* dsts, int num_dsts, const void* const* srcs, int num_srcs, int64_t count, DType dtype,
            ReduceOp op);
}
#if defined(__x86_64__)
namespace avx2 {
void reduce(void* const* dsts, int num_dsts, const void* const* srcs, int num_srcs, int64_t count, DType dtype,
            ReduceOp op);
}
namespace avx512 {
void reduce(void* const* dsts, int num_dsts, const void* const* srcs, int num_srcs, int64_t count, DType dtype,
            ReduceOp op);
}
#endif

namespace {

using Reduce = void (*)(void* const*, int, const void* const*, int, int64_t, DType, ReduceOp);

struct Capability {
  const char* name;
  Reduce reduce;
};

Capability choose() {
  const char* wish = std::getenv("PYPAR_CPU_CAPABILITY");
  const std::string limit = wish == nullptr ? "avx512" : wish;
  if (limit != "avx512" && limit != "avx2" && limit != "plain") {
    throw ArgumentError("PYPAR_CPU_CAPABILITY is '" + limit + "'; it must be avx512, avx2 or plain");
  }
#if defined(__x86_64__)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c");
  if (limit == "avx512" && avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")) {
    return {"avx512", avx512::reduce};
  }
  if (limit != "plain" && avx2) return {"avx2", avx2::reduce};
#endif
  return {"plain", plain::reduce};
}

const Capability& capability() {
  static const Capability chosen = choose();
  return chosen;
}

}  // namespace

const char* cpu_capability() {
  return capability().name;
}

void check_reduction(DType dtype, ReduceOp op) {
  const bool is_float = dtype == DType::f16 || dtype == DType::bf16 || dtype == DType::f32 || dtype == DType::f64;
  const bool bitwise = op == ReduceOp::band || op == ReduceOp::bor || op == ReduceOp::bxor;
  if (is_float ? bitwise : op == ReduceOp::avg) {
    throw ArgumentError(std::string("the reduction ") + name_of(op) + " has no meaning for " + name_of(dtype) +
                        (op == ReduceOp::avg ? "; sum and divide, or cast to a floating type" : ""));
  }
}

void reduce_rows(void* const* dsts, int num_dsts, const void* const* srcs, int num_srcs, int64_t count, DType dtype,
                 ReduceOp op) {
  if (count == 0) return;
  if (num_srcs > 1) return capability().reduce(dsts, num_dsts, srcs, num_srcs, count, dtype, op);
  for (int d = 0; d < num_dsts; ++d) copy_bytes(dsts[d], srcs[0], static_cast<size_t>(count) * item_size(dtype));
}

void reduce_rows(void* dst, const void* const* srcs, int num_srcs, int64_t count, DType dtype, ReduceOp op) {
  reduce_rows(&dst, 1, srcs, num_srcs, count, dtype, op);
}

namespace {

#if defined(__x86_64__)
__attribute__((target("avx2"))) void copy_avx2(std::byte* dst, const std::byte* src, size_t bytes) {
  using Vector = char __attribute__((vector_size(32), aligned(1), may_alias));
  size_t i = 0;
  for (; i + 128 <= bytes; i += 128) {
    const auto* from = reinterpret_cast<const Vector*>(src + i);
    auto* to = reinterpret_cast<Vector*>(dst + i);
    const Vector a = from[0], b = from[1], c = from[2], d = from[3];
    to[0] = a, to[1] = b, to[2] = c, to[3] = d;
  }
  if (i < bytes) std::memcpy(dst + i, src + i, bytes - i);
}
#endif

// From here to about the size of a core's L2, glibc's memcpy is `rep movsb`, which is slow on lines that another core
// holds: 256 KiB through a ring took 200 us with it, 16 us with this loop (2 cores of an EPYC, Zen 3; 2026-11-23).
constexpr size_t kOwnLoopBytes = 64 << 10;

}  // namespace

void copy_bytes(void* dst, const void* src, size_t bytes) {
  if (dst == src || bytes == 0) return;
#if defined(__x86_64__)
  static const bool avx2 = __builtin_cpu_supports("avx2");
  if (bytes >= kOwnLoopBytes && avx2) {
    return copy_avx2(static_cast<std::byte*>(dst), static_cast<const std::byte*>(src), bytes);
  }
#endif
  std::memcpy(dst, src, bytes);
}

}  // namespace pypar
