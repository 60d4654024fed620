// Dropout whose mask is a function of (seed, site, index in the full tensor): every rank finds the bits of its part.

#include <algorithm>

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include "cpu/tensors.h"

// The random words are integers, the same from every instruction set; so the loader may choose.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define PYPAR_CLONES __attribute__((target_clones("default", "avx2", "avx512f")))
#else
#define PYPAR_CLONES
#endif

namespace pypar {

namespace {

constexpr const char* kOp = "keyed_dropout";
constexpr int64_t kBlocks = 256;  // of 4 words each: what is made at a time stays in L1
constexpr int64_t kWords = 4 * kBlocks;
constexpr int64_t kGrain = 1 << 15;  // elements per thread, at least

// Philox 4x32-10 (Salmon et al., Parallel random numbers: as easy as 1, 2, 3, 2011): key = seed, counter = (block,
// site); words[4 * i + j] = word j of block first + i.
PYPAR_CLONES
void philox(uint32_t* words, uint64_t first, int64_t blocks, uint64_t site, uint64_t seed) {
  uint32_t a[kBlocks], b[kBlocks], c[kBlocks], d[kBlocks];
  for (int64_t i = 0; i < blocks; ++i) {
    const uint64_t block = first + static_cast<uint64_t>(i);
    a[i] = static_cast<uint32_t>(block), b[i] = static_cast<uint32_t>(block >> 32);
    c[i] = static_cast<uint32_t>(site), d[i] = static_cast<uint32_t>(site >> 32);
  }
  auto key_low = static_cast<uint32_t>(seed), key_high = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    for (int64_t i = 0; i < blocks; ++i) {
      const uint64_t p = uint64_t{a[i]} * 0xD2511F53u, q = uint64_t{c[i]} * 0xCD9E8D57u;
      a[i] = static_cast<uint32_t>(q >> 32) ^ b[i] ^ key_low, b[i] = static_cast<uint32_t>(q);
      c[i] = static_cast<uint32_t>(p >> 32) ^ d[i] ^ key_high, d[i] = static_cast<uint32_t>(p);
    }
    key_low += 0x9E3779B9u, key_high += 0xBB67AE85u;
  }
  for (int64_t i = 0; i < blocks; ++i) {
    words[4 * i] = a[i], words[4 * i + 1] = b[i], words[4 * i + 2] = c[i], words[4 * i + 3] = d[i];
  }
}

struct Mask {
  uint64_t seed, site, threshold;  // kept: word >= threshold, of 2^32
  double scale;
};

// count elements that lie one behind the other in the full tensor, the first of them at index `first`.
template <typename T>
void drop_run(T* dst, const T* src, int64_t count, int64_t first, const Mask& mask) {
  using Wide = std::conditional_t<std::is_same_v<T, double>, double, float>;
  const auto scale = static_cast<Wide>(mask.scale);
  uint32_t words[kWords];
  while (count > 0) {
    const int64_t skip = first % 4, num = std::min(count, kWords - skip);
    philox(words, static_cast<uint64_t>(first / 4), (skip + num + 3) / 4, mask.site, mask.seed);
    for (int64_t i = 0; i < num; ++i) {
      const bool kept = words[skip + i] >= mask.threshold;
      dst[i] = kept ? static_cast<T>(static_cast<Wide>(src[i]) * scale) : T(0);
    }
    dst += num, src += num, first += num, count -= num;
  }
}

// Where the elements of a part lie in the full tensor: of [outer, full, inner] the part has `ranges` of the middle dim.
struct Part {
  int64_t outer = 1, size = 0, full, inner = 1;
  std::vector<int64_t> ranges;  // start, stop, start, stop, ...

  Part(const at::Tensor& x, int64_t dim, int64_t full_size, at::IntArrayRef given)
      : full(full_size), ranges(given.vec()) {
    TORCH_CHECK_VALUE(dim >= 0 && dim < x.dim(), kOp, ": dim is ", dim, ", but x has ", x.dim(), " dims");
    TORCH_CHECK_VALUE(ranges.size() % 2 == 0, kOp, ": ranges ", given, " are not pairs of start and stop");
    for (size_t i = 0; i < ranges.size(); i += 2) {
      TORCH_CHECK_VALUE(0 <= ranges[i] && ranges[i] <= ranges[i + 1] && ranges[i + 1] <= full, kOp, ": ranges ", given,
                        " don't lie in the full dim of ", full);
      size += ranges[i + 1] - ranges[i];
    }
    TORCH_CHECK_VALUE(size == x.size(dim), kOp, ": ranges ", given, " hold ", size, " indices, but dim ", dim,
                      " of x has ", x.size(dim));
    for (int64_t d = 0; d < dim; ++d) outer *= x.size(d);
    for (int64_t d = dim + 1; d < x.dim(); ++d) inner *= x.size(d);
  }

  // Calls run(offset in the part, index in the full tensor, count) for what lies at [begin, end) of the part.
  template <typename Run>
  void for_runs(int64_t begin, int64_t end, const Run& run) const {
    while (begin < end) {
      const int64_t row = begin / (size * inner);
      int64_t within = begin % (size * inner);
      size_t r = 0;
      while (within >= (ranges[r + 1] - ranges[r]) * inner) within -= (ranges[r + 1] - ranges[r]) * inner, r += 2;
      const int64_t count = std::min(end - begin, (ranges[r + 1] - ranges[r]) * inner - within);
      run(begin, (row * full + ranges[r]) * inner + within, count);
      begin += count;
    }
  }
};

at::Tensor keyed_dropout(const at::Tensor& x, const at::Tensor& seed, int64_t site, double p, int64_t dim, int64_t full,
                         at::IntArrayRef ranges) {
  return with_python_errors([&] {
    check_cpu_tensor(kOp, "x", x), check_cpu_tensor(kOp, "seed", seed);
    TORCH_CHECK_VALUE(x.is_floating_point(), kOp, ": x is ", x.scalar_type(), ", expected a floating-point dtype");
    TORCH_CHECK_VALUE(p >= 0 && p <= 1, kOp, ": p is ", p, ", expected a probability from 0 to 1");
    TORCH_CHECK_VALUE(seed.scalar_type() == at::kLong && seed.numel() == 1, kOp, ": seed is ", seed.scalar_type(),
                      seed.sizes(), ", expected Long[]");
    const Part part(x, dim, full, ranges);
    const at::Tensor src = x.contiguous();
    at::Tensor dst = at::empty(x.sizes(), x.options());
    const Mask mask{static_cast<uint64_t>(seed.item<int64_t>()), static_cast<uint64_t>(site),
                    static_cast<uint64_t>(p * 4294967296.0), p < 1 ? 1 / (1 - p) : 0};
    AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x.scalar_type(), kOp, [&] {
      const auto* from = src.const_data_ptr<scalar_t>();
      auto* to = dst.mutable_data_ptr<scalar_t>();
      at::parallel_for(0, src.numel(), kGrain, [&](int64_t begin, int64_t end) {
        part.for_runs(begin, end, [&](int64_t at, int64_t index, int64_t count) {
          drop_run(to + at, from + at, count, index, mask);
        });
      });
    });
    return dst;
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(pypar, CPU, m) {
  m.impl("keyed_dropout", keyed_dropout);
}

}  // namespace pypar
