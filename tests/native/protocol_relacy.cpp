// The protocol of csrc/include/pypar/signal.h and csrc/comm/communicator.h, model-checked with Relacy: every read may
// return any value that the memory model allows, every interleaving may be tried. A mutation leaves one rule out; the
// checker must find what goes wrong then, or the model proves nothing.

#include "relacy_common.h"

namespace {

rl::memory_order publish_order() {
  return without("relaxed_publish") ? rl::mo_relaxed : rl::mo_release;
}
rl::memory_order wait_order() {
  return without("relaxed_wait") ? rl::mo_relaxed : rl::mo_acquire;
}

void spin_until(rl::atomic<unsigned>& word, unsigned target) {
  while (!reached(word($).load(wait_order()), target)) rl::yield(1, $);
}

// Communicator::Call: stage ahead, publish, wait, consume; epochs that wrap. kRooted: only rank 0's data is read, so
// the others wait for rank 0 alone and rank 0 for nobody but in next().
template <int kWorld, bool kRooted = false>
struct Rounds : rl::test_suite<Rounds<kWorld, kRooted>, kWorld> {
  static constexpr int kSlots = 4, kChunks = 5;
  static constexpr unsigned kStart = 0xfffffffdu;
  rl::atomic<unsigned> line[kWorld][kSlots];
  rl::var<unsigned> slot[kWorld][kSlots];

  void before() {
    for (auto& lines : line) {
      for (auto& word : lines) word($) = kStart;
    }
    for (auto& slots : slot) {
      for (auto& data : slots) data($) = 0;
    }
  }
  static int slot_of(unsigned round) { return static_cast<int>(round % (without("three_slots") ? 3 : kSlots)); }
  static unsigned payload(unsigned rank, unsigned round) { return rank * 100 + (round - kStart); }

  void stage_and_publish(unsigned me, unsigned round) {
    if (!without("no_slot_wait")) {
      for (unsigned peer = 0; peer < kWorld; ++peer) {
        if (peer != me) spin_until(line[peer][(round - 2) % kSlots], round - 2);
      }
    }
    slot[me][slot_of(round)]($) = payload(me, round);
    line[me][round % kSlots]($).store(round, publish_order());
  }
  void thread(unsigned me) {
    const unsigned first = kStart + 1;
    stage_and_publish(me, first);
    for (unsigned chunk = 0; chunk < kChunks; ++chunk) {
      if (chunk + 1 < kChunks) stage_and_publish(me, first + chunk + 1);
      for (unsigned peer = 0; peer < kWorld; ++peer) {
        if (peer == me || (kRooted && peer != 0)) continue;
        spin_until(line[peer][(first + chunk) % kSlots], first + chunk);
        RL_ASSERT(slot[peer][slot_of(first + chunk)]($) == payload(peer, first + chunk));
      }
    }
  }
};

// SymmetricMemory::barrier: data written before it is read after it, and may be written again after the next one.
struct Barrier : rl::test_suite<Barrier, 2> {
  rl::atomic<unsigned> epoch[2];
  rl::var<unsigned> data[2];
  void before() {
    for (int r = 0; r < 2; ++r) {
      epoch[r]($) = 0xffffffffu;
      data[r]($) = 0;
    }
  }
  void barrier(unsigned me, unsigned target) {
    epoch[me]($).store(target, publish_order());
    spin_until(epoch[1 - me], target);
  }
  void thread(unsigned me) {
    unsigned target = 0xffffffffu;
    for (unsigned i = 1; i <= 2; ++i) {
      data[me]($) = i;
      barrier(me, ++target);
      RL_ASSERT(data[1 - me]($) == i);
      if (!without("no_credit")) barrier(me, ++target);
    }
  }
};

// notify() and wait_signal() with a futex: no wake-up may be lost. Time slices are left out, so a lost one is a
// deadlock.
struct Futex : rl::test_suite<Futex, 2> {
  rl::atomic<unsigned> word, sleepers;
  rl::var<unsigned> data;
  rl::mutex kernel;
  rl::condition_variable queue;

  void before() {
    word($) = 0;
    sleepers($) = 0;
    data($) = 0;
  }
  void thread(unsigned me) {
    if (me == 0) {
      data($) = 7;
      word($).exchange(1, without("relaxed_publish") ? rl::mo_relaxed : rl::mo_seq_cst);
      if (sleepers($).load(rl::mo_seq_cst) != 0) {
        kernel.lock($);
        queue.notify_all($);
        kernel.unlock($);
      }
      return;
    }
    if (!reached(word($).load(rl::mo_acquire), 1)) {
      if (!without("no_announce") && !without("late_announce")) sleepers($).fetch_add(1, rl::mo_seq_cst);
      for (;;) {
        const unsigned seen = word($).load(without("relaxed_wait") ? rl::mo_relaxed : rl::mo_seq_cst);
        if (reached(seen, 1)) break;
        kernel.lock($);
        if (word($).load(rl::mo_relaxed) == seen) {
          if (without("late_announce")) sleepers($).fetch_add(1, rl::mo_relaxed);
          queue.wait(kernel, $);
        }
        kernel.unlock($);
      }
    }
    RL_ASSERT(data($) == 7);
  }
};

// put_signal / wait_signal: a depth of one; the buffer is written again only when the last signal was waited for.
struct Signal : rl::test_suite<Signal, 2> {
  rl::atomic<unsigned> sent, consumed;
  rl::var<unsigned> data;
  void before() {
    sent($) = 0xfffffffeu;
    consumed($) = 0xfffffffeu;
    data($) = 0;
  }
  void thread(unsigned me) {
    unsigned count = 0xfffffffeu;
    for (unsigned i = 1; i <= 4; ++i) {
      if (me == 0) {
        if (!without("no_credit")) spin_until(consumed, count);
        data($) = i;
        sent($).store(++count, publish_order());
      } else {
        spin_until(sent, ++count);
        RL_ASSERT(data($) == i);
        consumed($).store(count, publish_order());
      }
    }
  }
};

}  // namespace

int main(int argc, char** argv) {
  return run_model(argc, argv,
                   {{"rounds2", holds<Rounds<2>>},
                    {"rounds3", holds<Rounds<3>>},
                    {"rooted3", holds<Rounds<3, true>>},
                    {"barrier", holds<Barrier>},
                    {"futex", holds<Futex>},
                    {"signal", holds<Signal>}},
                   {"none", "relaxed_publish", "relaxed_wait", "three_slots", "no_slot_wait", "no_announce",
                    "late_announce", "no_credit"});
}
