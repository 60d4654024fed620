// The protocol of csrc/comm/rings.cpp and windows.cpp, model-checked with Relacy as the rest in protocol_relacy.cpp:
// slots and credits, messages that the receiver copies out of the sender's memory, the bell, pinned windows.

#include "relacy_common.h"

namespace {

constexpr unsigned kSlots = 4;
constexpr unsigned kCreditSlots = 2;  // a credit is given for so many slots at once

rl::memory_order unless(const char* rule, rl::memory_order weaker = rl::mo_relaxed) {
  return without(rule) ? weaker : rl::mo_seq_cst;
}

// Rings::publish, free_slots, drain and give_credit, with sequence numbers that wrap. kAnnounced: every third message
// is a slot that only says where the message lies; the sender's operation ends when that slot is credited, and then it
// writes its memory again.
template <bool kAnnounced>
struct Ring : rl::test_suite<Ring<kAnnounced>, 2> {
  static constexpr unsigned kStart = 0xfffffffdu, kMessages = 10;
  rl::atomic<unsigned> sequence[kSlots];
  rl::var<unsigned> slot[kSlots];
  rl::atomic<unsigned> consumed;
  rl::var<unsigned> window;

  void before() {
    for (auto& word : sequence) word($) = kStart - kSlots;
    for (auto& data : slot) data($) = 0;
    consumed($) = kStart;
    window($) = 0;
  }
  static bool announced(unsigned message) { return kAnnounced && message % 3 == 0; }

  void send() {
    unsigned sent = kStart, known = kStart, busy = kStart;  // busy: the last slot that announced `window`
    auto credited = [&](unsigned target) {
      while (!reached(known, target)) {
        known = consumed($).load(unless("relaxed_credit_wait"));
        if (!reached(known, target)) rl::yield(1, $);
      }
    };
    for (unsigned message = 1; message <= kMessages; ++message) {
      if (announced(message)) {
        if (!without("no_acknowledgement")) credited(busy);
        window($) = message;
      }
      const unsigned next = sent + 1;
      if (!without("no_credit")) credited(next - kSlots);
      slot[next % kSlots]($) = announced(message) ? 0 : message;
      sequence[next % kSlots]($).exchange(next, unless("relaxed_publish"));
      sent = next;
      if (announced(message)) busy = next;
    }
    if (kAnnounced) {
      credited(busy);
      window($) = 0;
    }
  }

  void receive() {
    unsigned taken = kStart, given = kStart;
    auto give_credit = [&](bool all) {
      if (taken - given < (all ? 1 : kCreditSlots)) return;
      given = taken;
      consumed($).exchange(taken + (without("credit_too_many") ? 1 : 0), unless("relaxed_credit"));
    };
    for (unsigned message = 1; message <= kMessages; ++message) {
      const unsigned next = taken + 1;
      while (sequence[next % kSlots]($).load(unless("relaxed_wait")) != next) rl::yield(1, $);
      auto count = [&] {
        taken = next;
        give_credit(announced(message));
      };
      if (without("credit_before_copy")) count();
      const unsigned where = slot[next % kSlots]($);
      RL_ASSERT((where == 0 ? window($) : where) == message);
      if (!without("credit_before_copy")) count();
    }
  }

  void thread(unsigned me) { me == 0 ? send() : receive(); }
};

// Rings::ring_bell against wait_until: both ranks sleep, the receiver for arrivals, the sender for credits. Time slices
// are left out, so a lost wake-up is a deadlock.
struct Bell : rl::test_suite<Bell, 2> {
  static constexpr unsigned kMessages = 2;  // through a ring of one slot
  rl::atomic<unsigned> sequence, consumed;
  rl::var<unsigned> data;
  struct Side {
    rl::atomic<unsigned> bell, sleepers;
    rl::mutex kernel;
    rl::condition_variable queue;
  } sides[2];

  void before() {
    sequence($) = 0;
    consumed($) = 0;
    data($) = 0;
    for (auto& side : sides) {
      side.bell($) = 0;
      side.sleepers($) = 0;
    }
  }
  void ring(Side& side) {
    if (side.sleepers($).load(unless("relaxed_look_for_sleepers")) == 0) return;
    side.bell($).fetch_add(1, rl::mo_seq_cst);
    side.kernel.lock($);
    side.queue.notify_all($);
    side.kernel.unlock($);
  }
  void tell(rl::atomic<unsigned>& word, unsigned value, Side& peer) {
    if (without("bell_before_publish")) ring(peer);
    word($).exchange(value, unless("release_publish", rl::mo_release));
    if (!without("bell_before_publish")) ring(peer);
  }
  void sleep_until(rl::atomic<unsigned>& word, unsigned target, Side& own) {
    if (reached(word($).load(rl::mo_acquire), target)) return;
    if (!without("no_announce") && !without("late_announce")) own.sleepers($).fetch_add(1, rl::mo_seq_cst);
    for (;;) {
      unsigned seen = own.bell($).load(rl::mo_seq_cst);
      if (reached(word($).load(unless("acquire_look", rl::mo_acquire)), target)) break;
      if (without("bell_read_late")) seen = own.bell($).load(rl::mo_seq_cst);
      own.kernel.lock($);
      if (own.bell($).load(rl::mo_relaxed) == seen) {
        if (without("late_announce")) own.sleepers($).fetch_add(1, rl::mo_seq_cst);
        own.queue.wait(own.kernel, $);
      }
      own.kernel.unlock($);
    }
    if (!without("no_announce")) own.sleepers($).fetch_sub(1, rl::mo_seq_cst);
  }
  void thread(unsigned me) {
    for (unsigned message = 1; message <= kMessages; ++message) {
      if (me == 0) {
        sleep_until(consumed, message - 1, sides[0]);
        data($) = message;
        tell(sequence, message, sides[1]);
      } else {
        sleep_until(sequence, message, sides[1]);
        RL_ASSERT(data($) == message);
        tell(consumed, message, sides[0]);
      }
    }
  }
};

// Windows::pin against forget: the receiver unmaps a window only if no message on its way needs it.
struct Pins : rl::test_suite<Pins, 2> {
  rl::atomic<unsigned> id, pins, announced;
  rl::var<unsigned> mapping;  // 1: mapped

  void before() {
    id($) = 1;
    pins($) = 0;
    announced($) = 0;
    mapping($) = 1;
  }
  void send() {
    if (without("look_before_pin") && id($).load(rl::mo_seq_cst) != 1) return announced($).store(2, rl::mo_release);
    pins($).fetch_add(1, unless("relaxed_pin"));
    if (!without("look_before_pin") && id($).load(unless("relaxed_pin")) != 1) {
      pins($).fetch_sub(1, rl::mo_seq_cst);
      return announced($).store(2, rl::mo_release);  // it travels through the ring instead
    }
    announced($).store(1, rl::mo_release);
  }
  void forget() {
    const bool swept_early = without("sweep_before_forget") && pins($).load(rl::mo_seq_cst) == 0;
    id($).store(0, unless("relaxed_forget"));
    const bool sweep = without("sweep_before_forget") ? swept_early : pins($).load(unless("relaxed_forget")) == 0;
    if (sweep) mapping($) = 0;
  }
  void thread(unsigned me) {
    if (me == 0) return send();
    forget();
    unsigned message;
    while ((message = announced($).load(rl::mo_acquire)) == 0) rl::yield(1, $);
    if (message == 2) return;
    RL_ASSERT(mapping($) == 1);
    pins($).fetch_sub(1, rl::mo_seq_cst);
    if (pins($).load(rl::mo_seq_cst) == 0) mapping($) = 0;
  }
};

}  // namespace

int main(int argc, char** argv) {
  return run_model(
      argc, argv,
      {{"ring", holds<Ring<false>>}, {"announced", holds<Ring<true>>}, {"bell", holds<Bell>}, {"pins", holds<Pins>}},
      {"none",
       "relaxed_publish",
       "relaxed_wait",
       "relaxed_credit",
       "relaxed_credit_wait",
       "no_credit",
       "credit_before_copy",
       "credit_too_many",
       "no_acknowledgement",
       "no_announce",
       "late_announce",
       "bell_before_publish",
       "bell_read_late",
       "release_publish",
       "acquire_look",
       "relaxed_look_for_sleepers",
       "look_before_pin",
       "relaxed_pin",
       "relaxed_forget",
       "sweep_before_forget"});
}
