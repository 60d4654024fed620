// The executor with one thread of the system per CUDA thread: for ThreadSanitizer and AddressSanitizer.

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <stdexcept>
#include <thread>
#include <vector>

#include "executor.h"

namespace emulation {

namespace {

struct Trapped {};

thread_local Thread here;
thread_local std::atomic<bool>* is_trapped = nullptr;

}  // namespace

// Of threads that may leave, and that a trap wakes.
class Barrier {
 public:
  explicit Barrier(unsigned num) : expected_(num) {}

  void arrive() {
    std::unique_lock lock(mutex_);
    const uint64_t turn = turn_;
    if (++arrived_ == expected_) {
      open();
      return;
    }
    while (turn == turn_) {
      if (is_trapped->load()) throw Trapped{};
      opened_.wait_for(lock, std::chrono::milliseconds(20));
    }
  }
  void leave() {
    const std::lock_guard lock(mutex_);
    if (arrived_ == --expected_ && arrived_ != 0) open();
  }

 private:
  void open() {
    arrived_ = 0, ++turn_;
    opened_.notify_all();
  }

  std::mutex mutex_;
  std::condition_variable opened_;
  unsigned expected_, arrived_ = 0;
  uint64_t turn_ = 0;
};

Thread& current() {
  return here;
}

void sync_block() {
  here.block->barrier->arrive();
}

void rest() {
  if (is_trapped->load(std::memory_order_relaxed)) throw Trapped{};
  std::this_thread::yield();
}

void trap() {
  is_trapped->store(true);
  throw Trapped{};
}

void run(const Launch& launch, bool co_resident, const std::function<void()>& kernel) {
  const unsigned num = launch.grid_dim.x, at_once = co_resident ? num : 1;
  std::atomic<bool> trapped = false;
  for (unsigned begin = 0; begin < num && !trapped; begin += at_once) {
    std::vector<Block> blocks(at_once);
    std::vector<std::thread> threads;
    for (unsigned b = 0; b < at_once; ++b) {
      Block& block = blocks[b];
      block.launch = &launch;
      block.index = Dim3(begin + b, 0, 0);
      block.shared.reset(new unsigned char[launch.shared_bytes]);
      block.barrier = std::make_shared<Barrier>(launch.block_dim.x);
      for (unsigned i = 0; i < launch.block_dim.x; ++i) {
        threads.emplace_back([&kernel, &trapped, &block, i] {
          here = {Dim3(i, 0, 0), &block};
          is_trapped = &trapped;
          try {
            kernel();
            block.barrier->leave();
          } catch (const Trapped&) {  // nobody of the block gets past a barrier any more
          }
        });
      }
    }
    for (std::thread& thread : threads) thread.join();
  }
  if (trapped) throw std::runtime_error("the kernel ended in a trap");
}

}  // namespace emulation
