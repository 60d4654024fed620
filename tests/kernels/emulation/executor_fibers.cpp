// The executor with CUDA threads as fibers of the launching thread.

#include <ucontext.h>
#include <unistd.h>

#include <memory>
#include <stdexcept>
#include <vector>

#include "executor.h"

namespace emulation {

namespace {

constexpr size_t kStackBytes = 64 * 1024;

enum class State { ready, at_barrier, resting, over };

struct Fiber {
  Thread thread;
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  State state = State::ready;
};

struct Scheduler {
  const std::function<void()>* kernel = nullptr;
  ucontext_t home;
  Fiber* running = nullptr;
  bool is_trapped = false;
  std::vector<std::unique_ptr<char[]>> stacks;  // kept from launch to launch

  void back() { swapcontext(&running->context, &home); }
};

thread_local Scheduler scheduler;

void fiber_main() {
  (*scheduler.kernel)();
  scheduler.running->state = State::over;
  scheduler.back();
}

std::unique_ptr<char[]> take_stack() {
  if (scheduler.stacks.empty()) return std::unique_ptr<char[]>(new char[kStackBytes]);
  auto stack = std::move(scheduler.stacks.back());
  scheduler.stacks.pop_back();
  return stack;
}

struct Running {
  Block block;
  std::vector<Fiber> fibers;

  Running(const Launch& launch, unsigned index) {
    block.launch = &launch;
    block.index = Dim3(index, 0, 0);
    block.shared.reset(new unsigned char[launch.shared_bytes]);
    fibers = std::vector<Fiber>(launch.block_dim.x);
    for (unsigned i = 0; i < launch.block_dim.x; ++i) {
      Fiber& fiber = fibers[i];
      fiber.thread.thread = Dim3(i, 0, 0);
      fiber.thread.block = &block;
      fiber.stack = take_stack();
      getcontext(&fiber.context);
      fiber.context.uc_stack.ss_sp = fiber.stack.get();
      fiber.context.uc_stack.ss_size = kStackBytes;
      makecontext(&fiber.context, fiber_main, 0);
    }
  }
  ~Running() {
    for (Fiber& fiber : fibers) scheduler.stacks.push_back(std::move(fiber.stack));
  }
  // Lets every thread go on once that can. Returns how many did something else than look again.
  int turn() {
    int moved = 0;
    for (Fiber& fiber : fibers) {
      if (fiber.state != State::ready && fiber.state != State::resting) continue;
      fiber.state = State::ready;
      scheduler.running = &fiber;
      swapcontext(&scheduler.home, &fiber.context);
      if (scheduler.is_trapped) return 0;
      moved += fiber.state != State::resting;
    }
    size_t arrived = 0, over = 0;
    for (Fiber& fiber : fibers) arrived += fiber.state == State::at_barrier, over += fiber.state == State::over;
    if (arrived != 0 && arrived + over == fibers.size()) {
      for (Fiber& fiber : fibers) fiber.state = fiber.state == State::over ? State::over : State::ready;
    }
    return moved;
  }
  bool is_over() const {
    for (const Fiber& fiber : fibers) {
      if (fiber.state != State::over) return false;
    }
    return true;
  }
};

}  // namespace

Thread& current() {
  return scheduler.running->thread;
}

void sync_block() {
  scheduler.running->state = State::at_barrier;
  scheduler.back();
}

void rest() {
  scheduler.running->state = State::resting;
  scheduler.back();
}

void trap() {
  scheduler.is_trapped = true;
  scheduler.back();
  __builtin_unreachable();
}

void run(const Launch& launch, bool co_resident, const std::function<void()>& kernel) {
  scheduler.kernel = &kernel;
  scheduler.is_trapped = false;
  const unsigned num = launch.grid_dim.x, at_once = co_resident ? num : 1;
  for (unsigned begin = 0; begin < num; begin += at_once) {
    std::vector<std::unique_ptr<Running>> blocks;
    for (unsigned i = 0; i < at_once; ++i) blocks.push_back(std::make_unique<Running>(launch, begin + i));
    for (bool is_over = false; !is_over;) {
      int moved = 0;
      is_over = true;
      for (auto& block : blocks) {
        if (block->is_over()) continue;
        moved += block->turn();
        if (scheduler.is_trapped) throw std::runtime_error("the kernel ended in a trap");
        is_over = is_over && block->is_over();
      }
      if (moved == 0 && !is_over) usleep(20);  // all of them wait for other ranks, which need the core
    }
  }
}

}  // namespace emulation
