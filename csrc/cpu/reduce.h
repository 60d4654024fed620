// dst[i] = srcs[0][i] op srcs[1][i] op ... , in that order, accumulated in float32 for half types, rounded once.
#pragma once

#include <cstdint>

#include "comm/types.h"

namespace pypar {

// dst may be one of the srcs (same address); no other overlap. For ReduceOp::avg the sum is multiplied by 1/num_srcs.
// Throws ArgumentError for a pair that has no meaning (avg of integers, bitwise of floats).
void reduce_rows(void* dst, const void* const* srcs, int num_srcs, int64_t count, DType dtype, ReduceOp op);
// The same into several destinations: each source is read once, each result leaves a register or L1.
void reduce_rows(void* const* dsts, int num_dsts, const void* const* srcs, int num_srcs, int64_t count, DType dtype,
                 ReduceOp op);
void check_reduction(DType dtype, ReduceOp op);
// "avx512", "avx2" or "plain": what this processor runs; PYPAR_CPU_CAPABILITY lowers it.
const char* cpu_capability();

// "rep movsb", "avx2" or "memcpy": how this processor moves large blocks.
const char* copy_method();
bool copies_without_reading();  // the lines that it overwrites

// memcpy that takes equal addresses and zero bytes.
void copy_bytes(void* dst, const void* src, size_t bytes);
// The same for what another core reads next: large blocks go past the caches, from which it would fetch them line by
// line. Complete before whatever this thread stores next.
void copy_to_peer(void* dst, const void* src, size_t bytes);

}  // namespace pypar
