// Runs the blocks and threads of a kernel on a CPU, all blocks of a co-resident grid at the same time.
//
// Threads are fibers of the launching thread: fast, and a scheduler that always runs somebody. With
// -DPYPAR_EMULATION_THREADS they are threads of their own, which is what the sanitizers understand. A trap ends the
// launch with an exception, wherever its other threads are: their stacks are left as they are, as a GPU leaves them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>

namespace emulation {

struct Dim3 {
  unsigned x = 1, y = 1, z = 1;
  Dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

struct Launch {
  Dim3 grid_dim, block_dim;
  size_t shared_bytes = 0;
};

class Barrier;

struct Block {
  const Launch* launch = nullptr;
  Dim3 index;
  std::unique_ptr<unsigned char[]> shared;
  std::shared_ptr<Barrier> barrier;
};

struct Thread {
  Dim3 thread;
  Block* block = nullptr;
};

// The CUDA thread that runs here.
Thread& current();

// __syncthreads: threads that are over don't count, as on a GPU since Volta.
void sync_block();

// A thread that waits for something outside of its block lets the others run.
void rest();

// Ends the launch; does not return.
[[noreturn]] void trap();

// Runs kernel() in every thread of the grid. co_resident: all blocks at once; otherwise one after another, the order
// that no kernel may depend on. Throws std::runtime_error after a trap.
void run(const Launch& launch, bool co_resident, const std::function<void()>& kernel);

}  // namespace emulation
