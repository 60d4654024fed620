// The kernels behind fixed_tiles.h, compiled once per instruction set as those of reduce_kernels.h, and like them
// without functions of the standard library. PYPAR_LANES: float32 in a vector of the target; PYPAR_TILE_ROWS and
// PYPAR_TILE_VECTORS: of the tile whose sums stay in registers. The vectors run over n, never over k.

#include "cpu/half_kernels.h"

// A fused multiply-add rounds once, where this arithmetic rounds twice: without it the plain instruction set and plain
// torch can give the same bits. Zen 4 loses little by it, as its adders stand beside its multipliers.
#if defined(__clang__)
#pragma clang fp contract(off)
#else
#pragma GCC optimize("fp-contract=off")
#endif

namespace pypar::PYPAR_TARGET {

namespace {

template <typename T>
inline constexpr int64_t kTileLanes = PYPAR_LANES * 4 / static_cast<int64_t>(sizeof(T));

inline float wide(float x) {
  return x;
}
inline double wide(double x) {
  return x;
}
inline float wide(Bf16 x) {
  return widen(x);
}
inline float wide(F16 x) {
  return widen(x);
}

// The sums of a tile over k, from registers to c. Rows of c lie c_stride apart.
template <int kVectors, typename T>
void tile(const T* a, const T* b, int64_t k, T* c, int64_t c_stride, bool add) {
  constexpr int64_t kLanes = kTileLanes<T>;
  // As typedefs: GCC drops the attributes of an alias of a template's type.
  typedef T Vector __attribute__((vector_size(kLanes * sizeof(T))));
  typedef T Loose __attribute__((vector_size(kLanes * sizeof(T)), aligned(sizeof(T)), may_alias));
  Vector sums[PYPAR_TILE_ROWS][kVectors];
  for (int i = 0; i < PYPAR_TILE_ROWS; ++i) {
    for (int j = 0; j < kVectors; ++j) sums[i][j] = Vector{};
  }
  for (int64_t at = 0; at < k; ++at, a += PYPAR_TILE_ROWS, b += kVectors * kLanes) {
    Vector factors[kVectors];
#pragma GCC unroll 8
    for (int j = 0; j < kVectors; ++j) factors[j] = *reinterpret_cast<const Loose*>(b + j * kLanes);
#pragma GCC unroll 16
    for (int i = 0; i < PYPAR_TILE_ROWS; ++i) {
      const Vector factor = a[i] - Vector{};
#pragma GCC unroll 8
      for (int j = 0; j < kVectors; ++j) {
        const Vector product = factor * factors[j];
        sums[i][j] = sums[i][j] + product;
      }
    }
  }
  for (int i = 0; i < PYPAR_TILE_ROWS; ++i) {
    for (int j = 0; j < kVectors; ++j) {
      auto* to = reinterpret_cast<Loose*>(c + i * c_stride + j * kLanes);
      *to = add ? *to + sums[i][j] : sums[i][j];
    }
  }
}

template <typename T>
void multiply(const void* a, const void* b, int64_t rows, int64_t cols, int64_t k, void* c, int64_t c_stride,
              bool add) {
  constexpr int64_t kLanes = kTileLanes<T>, kCols = PYPAR_TILE_VECTORS * kLanes;
  for (int64_t n = 0; n < cols; n += kCols) {
    const T* panel = static_cast<const T*>(b) + n * k;
    const int64_t vectors = n + kCols <= cols ? PYPAR_TILE_VECTORS : (cols - n + kLanes - 1) / kLanes;
    for (int64_t m = 0; m < rows; m += PYPAR_TILE_ROWS) {
      const T* from = static_cast<const T*>(a) + m * k;
      T* to = static_cast<T*>(c) + m * c_stride + n;
      switch (vectors) {
        case 1: tile<1>(from, panel, k, to, c_stride, add); break;
        case 2: tile<2>(from, panel, k, to, c_stride, add); break;
#if PYPAR_TILE_VECTORS > 2
        case 3: tile<3>(from, panel, k, to, c_stride, add); break;
#endif
#if PYPAR_TILE_VECTORS > 3
        default: tile<4>(from, panel, k, to, c_stride, add); break;
#endif
      }
    }
  }
}

template <typename T, typename From>
void pack_panel(T* dst, const From* src, int64_t row_stride, int64_t k_stride, int64_t rows, int64_t k, int64_t width) {
  if (rows < width) {
    for (int64_t i = 0; i < k * width; ++i) dst[i] = 0;
  }
  if (row_stride == 1) {
    for (int64_t at = 0; at < k; ++at) {
#pragma GCC ivdep
      for (int64_t i = 0; i < rows; ++i) dst[at * width + i] = wide(src[at * k_stride + i]);
    }
    return;
  }
  // A few rows at a time, so that their lines and those of dst stay in L1.
  constexpr int64_t kRows = 8;
  int64_t i = 0;
  for (; i + kRows <= rows; i += kRows) {
    for (int64_t at = 0; at < k; ++at) {
#pragma GCC unroll 8
      for (int64_t r = 0; r < kRows; ++r) dst[at * width + i + r] = wide(src[(i + r) * row_stride + at * k_stride]);
    }
  }
  for (; i < rows; ++i) {
    for (int64_t at = 0; at < k; ++at) dst[at * width + i] = wide(src[i * row_stride + at * k_stride]);
  }
}

template <typename T, typename From>
void pack_panels(T* dst, const Factor& from, int64_t rows, int64_t k, int64_t width, int64_t lanes) {
  const auto* src = static_cast<const From*>(from.data);
  for (int64_t i = 0; i < rows; i += width) {
    const int64_t num = rows - i < width ? rows - i : width;
    const int64_t held = (num + lanes - 1) / lanes * lanes;
    pack_panel(dst + i * k, src + i * from.row_stride, from.row_stride, from.k_stride, num, k, held);
  }
}

void pack(void* dst, const Factor& from, DType dtype, int64_t rows, int64_t k, int64_t width, int64_t lanes) {
  switch (dtype) {
    case DType::f64: return pack_panels<double, double>(static_cast<double*>(dst), from, rows, k, width, lanes);
    case DType::bf16: return pack_panels<float, Bf16>(static_cast<float*>(dst), from, rows, k, width, lanes);
    case DType::f16: return pack_panels<float, F16>(static_cast<float*>(dst), from, rows, k, width, lanes);
    default: return pack_panels<float, float>(static_cast<float*>(dst), from, rows, k, width, lanes);
  }
}

template <typename T>
void add(void* to, const void* from, int64_t count) {
  T* x = static_cast<T*>(to);
  const T* y = static_cast<const T*>(from);
#pragma GCC ivdep
  for (int64_t i = 0; i < count; ++i) x[i] = x[i] + y[i];
}

template <typename T>
constexpr FixedTiles tiles() {
  constexpr int64_t kLanes = kTileLanes<T>;
  return {PYPAR_TILE_ROWS, PYPAR_TILE_VECTORS * kLanes, kLanes, pack, multiply<T>, add<T>};
}

}  // namespace

extern const FixedTiles fixed_tiles_f32 = tiles<float>();
extern const FixedTiles fixed_tiles_f64 = tiles<double>();

}  // namespace pypar::PYPAR_TARGET
