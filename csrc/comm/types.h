// Element types, reductions and operations, free of torch so that the core runs under sanitizers alone.
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

namespace pypar {

enum class DType : uint8_t { u8, i8, i16, i32, i64, f16, bf16, f32, f64, boolean, bytes };
enum class ReduceOp : uint8_t { sum, avg, product, min, max, band, bor, bxor, tree, none };
enum class Op : uint8_t {
  none,
  barrier,
  all_reduce,
  reduce_scatter,
  all_gather,
  all_to_all,
  broadcast,
  reduce,
  gather,
  scatter,
  rendezvous,
  all_gather_rows,
  reduce_scatter_rows,
  all_reduce_rows,
};

size_t item_size(DType dtype);
const char* name_of(DType dtype);
const char* name_of(ReduceOp op);
const char* name_of(Op op);

// What ends a wait: a peer died, left, disagreed or did not answer in time. Python sees pypar.PeerError.
struct PeerError : std::runtime_error {
  explicit PeerError(const std::string& what) : std::runtime_error(what) {}
};

// A caller's mistake, seen before anything was sent. Python sees ValueError.
struct ArgumentError : std::invalid_argument {
  explicit ArgumentError(const std::string& what) : std::invalid_argument(what) {}
};

}  // namespace pypar
