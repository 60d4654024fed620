// Sleeps in random places, for tests that results don't depend on timing.
#pragma once

#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <thread>

#include <unistd.h>

namespace emulation {

struct Stalls {
  std::minstd_rand random;
  unsigned most_us = 0;

  Stalls() {
    const char* how = std::getenv("PYPAR_EMULATION_STALLS");
    unsigned seed = 0;
    if (how == nullptr || std::sscanf(how, "%u:%u", &seed, &most_us) != 2) most_us = 0;
    // Ranks are processes or threads, and must not stall alike.
    random.seed(seed + static_cast<unsigned>(getpid()) * 31 +
                static_cast<unsigned>(std::hash<std::thread::id>{}(std::this_thread::get_id())));
  }
};

// One time in `in`, when stalls are asked for.
inline void stall(unsigned in) {
  thread_local Stalls stalls;
  if (stalls.most_us == 0 || stalls.random() % in != 0) return;
  std::this_thread::sleep_for(std::chrono::microseconds(stalls.random() % stalls.most_us));
}

}  // namespace emulation
