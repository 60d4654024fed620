#include "cpu/reduce.h"

#include <cstdlib>
#include <cstring>
#include <string>

#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>
#ifndef bit_ERMS
#define bit_ERMS (1u << 9)
#endif
#endif

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
[[maybe_unused]] __attribute__((target("avx2"))) void copy_avx2(std::byte* dst, const std::byte* src, size_t bytes) {
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

[[maybe_unused]] void copy_movsb(std::byte* dst, const std::byte* src, size_t bytes) {
  asm volatile("rep movsb" : "+D"(dst), "+S"(src), "+c"(bytes) : : "memory");
}
#endif

[[maybe_unused]] void copy_libc(std::byte* dst, const std::byte* src, size_t bytes) {
  std::memcpy(dst, src, bytes);
}

struct Copy {
  const char* name;
  void (*copy)(std::byte*, const std::byte*, size_t);
};

// What moves large blocks to and from lines that another core holds. `rep movsb` writes whole lines without reading
// them first: on Zen 5 up to 3 times faster than vector loops when the cores share no cache. On Zen 3 its microcode is
// 12 times slower there than a vector loop (known of Zen 3 and 4: glibc bug 30994). Figures: docs/design/0002.
Copy choose_copy() {
#if defined(__SANITIZE_THREAD__) || defined(__SANITIZE_ADDRESS__)
  return {"memcpy", copy_libc};  // which the sanitizers see through
#elif defined(__x86_64__)
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  const bool erms = __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) != 0 && (ebx & bit_ERMS) != 0;
  if (erms && !__builtin_cpu_is("amdfam19h")) return {"rep movsb", copy_movsb};
  if (__builtin_cpu_supports("avx2")) return {"avx2", copy_avx2};
#endif
  return {"memcpy", copy_libc};
}

const Copy& block_copy() {
  static const Copy chosen = choose_copy();
  return chosen;
}

constexpr size_t kBlockBytes = 16 << 10;  // below, the C library's memcpy is as good

}  // namespace

const char* copy_method() {
  return block_copy().name;
}

bool copies_without_reading() {
#if defined(__x86_64__)
  return block_copy().copy == copy_movsb;
#else
  return false;
#endif
}

void copy_bytes(void* dst, const void* src, size_t bytes) {
  if (dst == src || bytes == 0) return;
  if (bytes < kBlockBytes) {
    std::memcpy(dst, src, bytes);
  } else {
    block_copy().copy(static_cast<std::byte*>(dst), static_cast<const std::byte*>(src), bytes);
  }
}

namespace {

#if defined(__x86_64__)
// Whole lines by stores past the caches. bytes: of at least two lines.
__attribute__((target("avx2"))) void stream_avx2(std::byte* dst, const std::byte* src, size_t bytes) {
  constexpr size_t kLine = 64;
  const size_t head = (kLine - reinterpret_cast<uintptr_t>(dst) % kLine) % kLine;
  std::memcpy(dst, src, head);
  size_t i = head;
  for (; i + kLine <= bytes; i += kLine) {
    const auto* from = reinterpret_cast<const __m256i*>(src + i);
    auto* to = reinterpret_cast<__m256i*>(dst + i);
    const __m256i a = _mm256_loadu_si256(from), b = _mm256_loadu_si256(from + 1);
    _mm256_stream_si256(to, a);
    _mm256_stream_si256(to + 1, b);
  }
  std::memcpy(dst + i, src + i, bytes - i);
  _mm_sfence();  // such stores keep no order with others
}
#endif

bool can_stream() {
#if defined(__SANITIZE_THREAD__) || defined(__SANITIZE_ADDRESS__)
  return false;
#elif defined(__x86_64__)
  return __builtin_cpu_supports("avx2") != 0;
#else
  return false;
#endif
}

constexpr size_t kStreamBytes = 64 << 10;  // figures: docs/design/0002

}  // namespace

void copy_to_peer(void* dst, const void* src, size_t bytes) {
  [[maybe_unused]] static const bool streams = can_stream();
#if defined(__x86_64__)
  if (streams && bytes >= kStreamBytes) {
    return stream_avx2(static_cast<std::byte*>(dst), static_cast<const std::byte*>(src), bytes);
  }
#endif
  copy_bytes(dst, src, bytes);
}

}  // namespace pypar
