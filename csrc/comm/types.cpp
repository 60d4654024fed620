#include "comm/types.h"

namespace pypar {

size_t item_size(DType dtype) {
  switch (dtype) {
    case DType::i16:
    case DType::f16:
    case DType::bf16: return 2;
    case DType::i32:
    case DType::f32: return 4;
    case DType::i64:
    case DType::f64: return 8;
    default: return 1;
  }
}

const char* name_of(DType dtype) {
  constexpr const char* kNames[] = {"uint8",    "int8",    "int16",   "int32", "int64", "float16",
                                    "bfloat16", "float32", "float64", "bool",  "byte"};
  return kNames[static_cast<size_t>(dtype)];
}

const char* name_of(ReduceOp op) {
  constexpr const char* kNames[] = {"sum", "avg",  "product",          "min", "max", "band",
                                    "bor", "bxor", "sum along a tree", "none"};
  return kNames[static_cast<size_t>(op)];
}

const char* name_of(Op op) {
  constexpr const char* kNames[] = {"nothing",
                                    "barrier",
                                    "all_reduce",
                                    "reduce_scatter",
                                    "all_gather",
                                    "all_to_all",
                                    "broadcast",
                                    "reduce",
                                    "gather",
                                    "scatter",
                                    "rendezvous",
                                    "all_gather of rows",
                                    "reduce_scatter of rows",
                                    "all_reduce of rows"};
  return kNames[static_cast<size_t>(op)];
}

}  // namespace pypar
