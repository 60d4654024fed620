// Multicast addresses of the emulation: no memory lies there, a table says in which ranks' memory their bytes are. So
// anything but the functions of pypar/signal.cuh that take such an address crashes.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

namespace emulation {

struct Multicast {
  uintptr_t begin;
  size_t bytes;
  std::vector<int64_t> pointers;  // every rank's memory, as this one maps it
};

inline std::vector<Multicast> multicasts;

// Before kernels run. Returns the address.
inline int64_t add_multicast(const int64_t* pointers, int64_t world, int64_t bytes) {
  const uintptr_t begin = (uintptr_t{1} << 62) + (multicasts.size() << 40);
  multicasts.push_back({begin, static_cast<size_t>(bytes), {pointers, pointers + world}});
  return static_cast<int64_t>(begin);
}

// The 16 bytes at `address` in the memory of each rank.
inline std::vector<char*> places_of(const void* address) {
  const auto at = reinterpret_cast<uintptr_t>(address);
  for (const Multicast& all : multicasts) {
    if (at < all.begin || at + 16 > all.begin + all.bytes) continue;
    std::vector<char*> places;
    for (int64_t pointer : all.pointers) places.push_back(reinterpret_cast<char*>(pointer) + (at - all.begin));
    return places;
  }
  std::fprintf(stderr, "%p is no multicast address\n", address);
  std::abort();
}

}  // namespace emulation
