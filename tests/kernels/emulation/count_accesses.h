// Counts the bytes that the kernels of one rank, a thread, load and store in memory that it has been told of.
#pragma once

#include <cstddef>
#include <cstdint>

namespace emulation {

// own: tensors and this rank's slots. peer: the channels of the others, their flags too. Whatever lies elsewhere, this
// rank's own flags, stacks, arguments, isn't counted.
enum class Place { own, peer };

struct Counts {
  int64_t read = 0, written = 0, to_peers = 0, from_peers = 0;
};

// From here on this thread's accesses to [begin, begin + bytes) count.
void count_in(const void* begin, size_t bytes, Place place);

// Of this thread so far.
Counts counts();

}  // namespace emulation
