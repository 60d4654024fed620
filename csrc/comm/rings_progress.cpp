// Who moves messages, and when: waiting threads, the background thread; and what ends operations that can't complete.

#include <algorithm>
#include <utility>

#include "comm/rings_layout.h"

namespace pypar {

namespace {

constexpr auto kNap = std::chrono::milliseconds(1);
constexpr auto kLongestNap = std::chrono::milliseconds(16);
constexpr int kNapsBeforeIdle = 20;

}  // namespace

// Tells the owners, outside the lock: a callback may post again.
void Rings::report(const Ops& finished) {
  for (const auto& op : finished) {
    if (op->on_done) std::exchange(op->on_done, nullptr)(op->error);
    op->state.store(op->error ? RingOp::failed : RingOp::done, std::memory_order_seq_cst);
  }
  if (!finished.empty()) ring_bell(me_, false);  // another thread of this rank may sleep until one of these is done
}

void Rings::announce(int src, int64_t tag, size_t bytes, DType dtype, Fetch fetch) {
  Ops finished;
  std::shared_ptr<RingOp> op;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    if (stop_ || comm_.aborted()) return;
    unexpected_.push_back(
        std::make_unique<Message>(Message{src, tag, dtype, bytes, /*complete=*/true, nullptr, std::move(fetch)}));
    op = match(src, tag);
    if (!op) return;
    take_unexpected(op, finished, fetch);
  }
  report(finished);
  if (fetch) fetch_into(op, fetch);
}

// Without the lock: it may last. The operation stays pending, so that its memory stays.
void Rings::fetch_into(const std::shared_ptr<RingOp>& op, const Fetch& fetch) {
  std::exception_ptr error;
  try {
    fetch(op->data);
  } catch (const PeerError&) {
    error = std::current_exception();
  }
  Ops finished;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    finish(op, error, finished);
  }
  report(finished);
}

bool Rings::progress(Ops& finished) {
  bool moved = false;
  for (int r = 0; r < world_; ++r) {
    const auto i = static_cast<size_t>(r);
    moved |= complete_announced(r, finished);
    if (!out_[i].queue.empty()) moved |= push(r, finished);
    if (wanted_[i] + wanted_any_ > 0 && r != me_) moved |= drain(r, finished);
  }
  const uint64_t now = now_ns();
  if (now - checked_ns_ > kRingSliceNs) {
    checked_ns_ = now;
    check_pending(finished);
  }
  return moved;
}

// Fails what can't complete any more: deadline, dead peer, abort.
void Rings::check_pending(Ops& finished) {
  std::vector<std::pair<std::shared_ptr<RingOp>, std::exception_ptr>> hopeless;
  for (const auto& op : pending_) {
    if (op->fetching) continue;
    try {
      comm_.check_alive(op->peer == kAnySource ? me_ : op->peer, text_of(*op), op->deadline);
      if (op->peer != kAnySource) continue;
      int gone = 0;
      for (int r = 0; r < comm_.num_places(); ++r) {
        try {
          if (r != me_) comm_.check_alive(r, text_of(*op), {});
        } catch (const PeerError&) {
          if (++gone == comm_.num_places() - 1) throw;
        }
      }
    } catch (const PeerError&) {
      hopeless.emplace_back(op, std::current_exception());
    }
  }
  if (hopeless.empty()) return;
  for (int r = 0; r < world_; ++r) {
    // A peer that has left may have sent before.
    if (r != me_ && wanted_[static_cast<size_t>(r)] + wanted_any_ > 0 && !comm_.aborted()) drain(r, finished);
  }
  for (auto& [op, error] : hopeless) {
    if (std::find(pending_.begin(), pending_.end(), op) == pending_.end()) continue;
    try {
      std::rethrow_exception(error);
    } catch (const PeerError& why) {
      comm_.abort(why.what());
    }
    fail_pending(error, finished);  // the group is over: none of them can be trusted to complete
    return;
  }
}

void Rings::fail_pending(std::exception_ptr error, Ops& finished) {
  posted_.clear();
  for (auto& out : out_) {
    out.queue.clear();
    out.announced.clear();
  }
  for (auto& in : in_) in.op = nullptr;
  const Ops all = pending_;
  for (const auto& op : all) {
    if (!op->fetching) finish(op, error, finished);
  }
  // A half-received message has no home now; nothing is received after an abort.
}

void Rings::fail_all(const std::string& why) {
  Ops finished;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    fail_pending(std::make_exception_ptr(PeerError(why)), finished);
  }
  report(finished);
}

bool Rings::cancel(const std::shared_ptr<RingOp>& op, const std::string& why) {
  Ops finished;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    auto& queue = op->is_send ? out_[static_cast<size_t>(op->peer)].queue : posted_;
    auto it = std::find(queue.begin(), queue.end(), op);
    if (it == queue.end() || op->moved != 0) return false;
    queue.erase(it);
    finish(op, std::make_exception_ptr(PeerError(why)), finished);
  }
  report(finished);
  return true;
}

void Rings::wait(const std::shared_ptr<RingOp>& op, Deadline deadline) {
  if (!wait_until(op, deadline)) {
    const std::string why = comm_.rank_text(me_) + " of group '" + comm_.name() + "' in " + text_of(*op) + ": waited " +
                            std::to_string(deadline.timeout_ms) + " ms, the timeout given to wait()";
    comm_.abort(why);
    fail_all(why);
    wait_until(op, {});  // what another host was sending ends when its connection is cut
  }
  if (op->error) std::rethrow_exception(op->error);
}

bool Rings::wait_until(const std::shared_ptr<RingOp>& op, Deadline deadline) {
  if (op->finished()) return true;
  struct Waiting {
    Rings& rings;
    std::atomic_ref<uint32_t> sleepers;
    bool asleep = false;
    explicit Waiting(Rings& r) : rings(r), sleepers(r.control(r.me_).sleepers) { count(1); }
    ~Waiting() {
      count(-1);
      if (asleep) sleepers.fetch_sub(1, std::memory_order_seq_cst);
    }
    void count(int by) {
      std::lock_guard<std::mutex> lock(rings.mutex_);
      rings.waiters_ += by;
    }
  } waiting(*this);
  auto advance = [&] {
    Ops finished;
    bool moved;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      moved = progress(finished);
    }
    report(finished);
    return moved;
  };
  auto look_for_interrupt = [&] {
    try {
      comm_.check_interrupt(text_of(*op));
    } catch (const Interrupted& error) {
      fail_all(error.what());  // what the caller owns may be gone when this has been thrown
      throw;
    }
  };
  uint64_t looked = now_ns();
  uint64_t spin_until = now_ns() + comm_.spin_ns();
  uint32_t& bell = control(me_).bell;
  while (!op->finished()) {
    if (waiting.asleep) {
      const uint32_t seen = std::atomic_ref<uint32_t>(bell).load(std::memory_order_seq_cst);
      if (!advance() && !op->finished()) futex_sleep(bell, seen, kRingSliceNs);
    } else if (advance()) {
      spin_until = now_ns() + comm_.spin_ns();
      continue;
    } else {
      for (int i = 0; i < 8; ++i) cpu_relax();
    }
    const uint64_t now = now_ns();
    if (!waiting.asleep && now >= spin_until) {
      waiting.asleep = true;
      waiting.sleepers.fetch_add(1, std::memory_order_seq_cst);
    }
    if (now - looked > kRingSliceNs) {
      looked = now;
      look_for_interrupt();
    }
    if (deadline.at_ns != 0 && now >= deadline.at_ns) return op->finished();
  }
  return true;
}

void Rings::start_background() {
  if (!background_.joinable()) {
    background_ = std::thread([this] { run_background(); });
  } else if (background_idle_) {
    wake_background_.notify_one();
  }
}

void Rings::run_background() {
  Communicator::set_background_thread(true);
  Control& own = control(me_);
  std::atomic_ref<uint32_t> sleepers(own.sleepers);
  std::unique_lock<std::mutex> lock(mutex_);
  int naps = 0;
  auto nap = kNap;
  while (!stop_) {
    if (pending_.empty() && ++naps > kNapsBeforeIdle) {
      background_idle_ = true;
      wake_background_.wait(lock, [&] { return stop_ || !pending_.empty(); });
      background_idle_ = false;
      naps = 0;
    }
    // Give the caller time to wait itself: a thread that is woken for every message costs more than it saves.
    wake_background_.wait_for(lock, nap, [&] { return stop_; });
    nap = waiters_ > 0 ? std::min(2 * nap, kLongestNap) : kNap;
    if (stop_ || pending_.empty() || waiters_ > 0) continue;
    naps = 0;
    sleepers.fetch_add(1, std::memory_order_seq_cst);
    while (!stop_ && !pending_.empty() && waiters_ == 0) {
      const uint32_t seen = std::atomic_ref<uint32_t>(own.bell).load(std::memory_order_seq_cst);
      Ops finished;
      const bool moved = progress(finished);
      lock.unlock();
      report(finished);
      finished.clear();
      if (!moved) futex_sleep(own.bell, seen, kRingSliceNs);
      lock.lock();
    }
    sleepers.fetch_sub(1, std::memory_order_seq_cst);
  }
}

}  // namespace pypar
