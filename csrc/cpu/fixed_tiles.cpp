#include "cpu/fixed_tiles.h"

#include <algorithm>
#include <bit>
#include <cstddef>
#include <cstring>
#include <string_view>

#include <ATen/Parallel.h>
#include <c10/core/CPUAllocator.h>

#include "cpu/reduce.h"

namespace pypar {

#define PYPAR_DECLARE(target)              \
  namespace target {                       \
  extern const FixedTiles fixed_tiles_f32; \
  extern const FixedTiles fixed_tiles_f64; \
  }
PYPAR_DECLARE(plain)
#if defined(__x86_64__)
PYPAR_DECLARE(avx2)
PYPAR_DECLARE(avx512)
#endif

namespace {

const FixedTiles& tiles_for(DType dtype) {
  const bool is_double = dtype == DType::f64;
#if defined(__x86_64__)
  static const std::string_view capability = cpu_capability();
  if (capability == "avx512") return is_double ? avx512::fixed_tiles_f64 : avx512::fixed_tiles_f32;
  if (capability == "avx2") return is_double ? avx2::fixed_tiles_f64 : avx2::fixed_tiles_f32;
#endif
  return is_double ? plain::fixed_tiles_f64 : plain::fixed_tiles_f32;
}

// What is packed at a time: columns, so that their 256 k stay in L2, and rows, so that theirs leave it room; and rows
// whose sums exist at a time. Bits don't depend on these.
constexpr int64_t kCols = 512, kRows = 96, kSumRows = 1024;

int64_t up_to(int64_t count, int64_t unit) {
  return (count + unit - 1) / unit * unit;
}

// Rows [m, m + rows) and columns [n, n + cols) of the product.
class Corner {
 public:
  Corner(const std::vector<FixedTerm>& terms, int num_parts, DType dtype)
      : terms_(terms),
        num_parts_(num_parts),
        dtype_(dtype),
        tiles_(tiles_for(dtype)),
        item_(dtype == DType::f64 ? 8 : 4) {}

  void compute(int64_t m, int64_t rows, int64_t n, int64_t cols, std::byte* out, int64_t out_stride) {
    const int64_t most_rows = up_to(std::min(rows, kSumRows), tiles_.rows);
    const int64_t most_cols = up_to(std::min(cols, up_to(kCols, tiles_.cols)), tiles_.lanes);
    const int levels = std::bit_width(static_cast<unsigned>(num_parts_));
    a_ = allocate(up_to(kRows, tiles_.rows) * kFixedBlock);
    b_ = allocate(most_cols * kFixedBlock);
    sum_items_ = most_rows * most_cols;
    sums_ = allocate(levels * sum_items_);
    for (int64_t j = 0; j < cols; j += most_cols) {
      for (int64_t i = 0; i < rows; i += kSumRows) {
        const int64_t num = std::min(kSumRows, rows - i), across = std::min(most_cols, cols - j);
        tree(m + i, num, n + j, across);
        for (int64_t r = 0; r < num; ++r) {
          std::memcpy(out + ((m + i + r) * out_stride + n + j) * item_, sums_at(0) + r * stride(across) * item_,
                      static_cast<size_t>(across * item_));
        }
      }
    }
  }

 private:
  at::DataPtr allocate(int64_t items) const {
    return c10::GetCPUAllocator()->allocate(static_cast<size_t>(items * item_));
  }
  int64_t stride(int64_t cols) const { return up_to(cols, tiles_.lanes); }
  std::byte* sums_at(int level) const { return static_cast<std::byte*>(sums_.get()) + level * sum_items_ * item_; }

  // The parts are made in order; two sums of as many parts are added as soon as both are there.
  void tree(int64_t m, int64_t rows, int64_t n, int64_t cols) {
    int level = 0;
    for (int p = 0; p < num_parts_; ++p) {
      part(p, m, rows, n, cols, sums_at(level++));
      for (int done = p; done & 1; done >>= 1, --level) {
        tiles_.add(sums_at(level - 2), sums_at(level - 1), up_to(rows, tiles_.rows) * stride(cols));
      }
    }
  }

  void part(int p, int64_t m, int64_t rows, int64_t n, int64_t cols, std::byte* sums) {
    bool add = false;
    for (const FixedTerm& term : terms_) {
      const int64_t end = term.begins[static_cast<size_t>(p) + 1];
      for (int64_t k = term.begins[static_cast<size_t>(p)]; k < end; k += kFixedBlock, add = true) {
        const int64_t num = std::min(kFixedBlock, end - k);
        tiles_.pack(b_.get(), from(term.b, n, k), dtype_, cols, num, tiles_.cols, tiles_.lanes);
        for (int64_t i = 0; i < rows; i += kRows) {
          const int64_t some = std::min(kRows, rows - i);
          tiles_.pack(a_.get(), from(term.a, m + i, k), dtype_, some, num, tiles_.rows, tiles_.rows);
          tiles_.multiply(a_.get(), b_.get(), some, cols, num, sums + i * stride(cols) * item_, stride(cols), add);
        }
      }
    }
    if (!add) std::memset(sums, 0, static_cast<size_t>(up_to(rows, tiles_.rows) * stride(cols) * item_));
  }

  Factor from(const Factor& whole, int64_t row, int64_t k) const {
    const int64_t items = row * whole.row_stride + k * whole.k_stride;
    return {static_cast<const std::byte*>(whole.data) + items * static_cast<int64_t>(item_size(dtype_)),
            whole.row_stride, whole.k_stride};
  }

  const std::vector<FixedTerm>& terms_;
  const int num_parts_;
  const DType dtype_;
  const FixedTiles& tiles_;
  const int64_t item_;
  int64_t sum_items_ = 0;
  at::DataPtr a_, b_, sums_;
};

constexpr int64_t kSmall = 64 * 64 * 64;  // products that one thread finishes sooner than two can begin

}  // namespace

void fixed_product(const std::vector<FixedTerm>& terms, int num_parts, DType dtype, int64_t M, int64_t N, void* out) {
  if (M == 0 || N == 0) return;
  const FixedTiles& tiles = tiles_for(dtype);
  int64_t k = 0;
  for (const FixedTerm& term : terms) k += term.begins.back() - term.begins.front();
  const int64_t threads = M * N * k <= kSmall ? 1 : at::get_num_threads();
  const int64_t across = std::min(threads, up_to(N, tiles.cols) / tiles.cols);
  const int64_t down = std::min(std::max<int64_t>(1, threads / across), up_to(M, tiles.rows) / tiles.rows);
  const int64_t cols = up_to((N + across - 1) / across, tiles.cols);
  const int64_t rows = up_to((M + down - 1) / down, tiles.rows);
  at::parallel_for(0, across * down, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t m = task / across * rows, n = task % across * cols;
      if (m >= M || n >= N) continue;
      Corner(terms, num_parts, dtype)
          .compute(m, std::min(rows, M - m), n, std::min(cols, N - n), static_cast<std::byte*>(out), N);
    }
  });
}

}  // namespace pypar
