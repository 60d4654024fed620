// From tensors to what kernels take: checks, the channel, element types, sizes of grids. Included by launchers only.
#pragma once

#include <algorithm>
#include <array>

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include "cuda/channel.cuh"
#include "cuda/elements.cuh"
#include "cuda/reduce_scatter.cuh"
#include "cuda/stream.cuh"
#include "pypar/launch.cuh"

namespace pypar {

inline constexpr int kThreads = 256;
inline constexpr int kMostBlocks = 64;  // co-resident on every GPU with 16-byte stores in flight; saturates NVLink

// One vector of 16 bytes a thread until there are kMostBlocks. A pure function of the size: ranks must agree.
inline int blocks_for(int64_t bytes, int most = kMostBlocks) {
  const int64_t each = 16 * kThreads;
  return static_cast<int>(std::clamp<int64_t>((bytes + each - 1) / each, 1, most));
}

inline void check_like(const char* op, const char* name, const at::Tensor& x, const at::Tensor& like) {
  TORCH_CHECK_VALUE(x.device() == like.device() && x.is_contiguous(), op, ": ", name, " is on ", x.device(),
                    x.is_contiguous() ? "" : " and not contiguous", ", expected a contiguous tensor on ",
                    like.device());
}

// The channel that `pointers` [world] int64 describes, as pypar/channel.py makes it. report: int32 [4] on the host, or
// none.
inline Channel channel_from(const char* op, const at::Tensor& pointers, int64_t rank, int64_t slot_bytes,
                            double timeout_s, const std::optional<at::Tensor>& report) {
  TORCH_CHECK_VALUE(pointers.scalar_type() == at::kLong && pointers.dim() == 1 && pointers.is_contiguous(), op,
                    ": pointers is ", pointers.scalar_type(), pointers.sizes(), ", expected int64 [world_size]");
  const int64_t world = pointers.numel();
  TORCH_CHECK_VALUE(world >= 1 && world <= kMaxRanks && rank >= 0 && rank < world, op, ": rank ", rank, " of ", world,
                    ", expected at most ", kMaxRanks, " ranks");
  TORCH_CHECK_VALUE(slot_bytes >= 0 && slot_bytes % 256 == 0, op, ": slot_bytes is ", slot_bytes,
                    ", expected a multiple of 256");
  TORCH_CHECK_VALUE(timeout_s > 0, op, ": timeout_s is ", timeout_s, ", expected more than 0");
  uint32_t* to = nullptr;
  if (report.has_value()) {
    TORCH_CHECK_VALUE(report->is_cpu() && report->scalar_type() == at::kInt && report->numel() >= 4, op, ": report is ",
                      report->scalar_type(), report->sizes(), " on ", report->device(),
                      ", expected int32 [4] in pinned memory of the host");
    to = reinterpret_cast<uint32_t*>(report->mutable_data_ptr<int32_t>());
  }
  return {pointers.const_data_ptr<int64_t>(),
          static_cast<int>(rank),
          static_cast<int>(world),
          slot_bytes,
          static_cast<uint64_t>(timeout_s * 1'000'000'000),
          to};
}

inline void check_slot(const char* op, const Channel& channel, int64_t bytes) {
  if (channel.world == 1) return;  // nothing goes through it
  TORCH_CHECK_VALUE(bytes <= channel.slot_bytes, op, ": needs ", bytes, " bytes in each slot, the channel has ",
                    channel.slot_bytes, "; make it with pypar.channel.channel_of(..., slot_bytes=", bytes, ")");
}

inline Reduction reduction_of(const char* op, const std::string& name) {
  constexpr std::array<const char*, 5> kNames{"sum", "avg", "product", "min", "max"};
  for (size_t i = 0; i < kNames.size(); ++i) {
    if (name == kNames[i]) return static_cast<Reduction>(i);
  }
  TORCH_CHECK_VALUE(false, op, ": op is '", name, "', expected sum, avg, product, min or max");
}

// Of every rank's shard.
inline Cuts cuts_from(const char* op, const Channel& channel, at::IntArrayRef sizes) {
  TORCH_CHECK_VALUE(static_cast<int>(sizes.size()) == channel.world, op, ": sizes ", sizes, ", expected those of ",
                    channel.world, " ranks");
  Cuts cuts{};
  for (int r = 0; r < channel.world; ++r) {
    const int64_t size = sizes[static_cast<size_t>(r)];
    TORCH_CHECK_VALUE(size >= 0, op, ": sizes ", sizes, ", expected none below 0");
    cuts.begin[r + 1] = cuts.begin[r] + size;
  }
  return cuts;
}

// Bytes of the pieces of the largest shard in its owner's slot.
template <typename T>
int64_t pieces_bytes(const Channel& channel, at::IntArrayRef sizes) {
  const int64_t most = sizes.empty() ? 0 : *std::max_element(sizes.begin(), sizes.end());
  return channel.world * stride_of<T>(most) * static_cast<int64_t>(sizeof(T));
}

inline void check_numel(const char* op, const char* name, const at::Tensor& x, at::ScalarType type, int64_t numel) {
  TORCH_CHECK_VALUE(x.scalar_type() == type && x.numel() == numel, op, ": ", name, " is ", x.scalar_type(), x.sizes(),
                    ", expected ", numel, " numbers of ", type);
}

// body(T{}) for the type that kernels compute in. with_gradient: without float64, whose sums would need a wider one.
template <typename Body>
void with_gradient(const char* op, at::ScalarType type, Body&& body) {
  switch (type) {
    case at::kFloat: return body(float{});
    case at::kBFloat16: return body(__nv_bfloat16{});
    case at::kHalf: return body(__half{});
    default: TORCH_CHECK_VALUE(false, op, ": ", type, " is not supported, expected float32, bfloat16 or float16");
  }
}

template <typename Body>
void with_element(const char* op, at::ScalarType type, Body&& body) {
  if (type == at::kDouble) return body(double{});
  with_gradient(op, type, std::forward<Body>(body));
}

// body(T{}) for a type of as many bytes, where nothing but copies is done.
template <typename Body>
void with_bytes(size_t item_bytes, Body&& body) {
  switch (item_bytes) {
    case 1: return body(uint8_t{});
    case 2: return body(uint16_t{});
    case 4: return body(uint32_t{});
    case 8: return body(uint64_t{});
    default: TORCH_CHECK_VALUE(false, "an element of ", item_bytes, " bytes is not supported, expected 1, 2, 4 or 8");
  }
}

}  // namespace pypar
