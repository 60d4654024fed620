// Long, because matching, credits and progress keep one invariant under one lock; apart they would share it all.
#include "comm/rings.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "cpu/reduce.h"
#include "pypar/signal.h"

namespace pypar {

namespace {

constexpr uint32_t kRingSlots = 32;  // a power of two: sequence numbers wrap
constexpr size_t kHeaderBytes = 64u << 10;
constexpr size_t kInlineMessageBytes = 32;
constexpr uint32_t kCreditSlots = kRingSlots / 4;  // a credit is a line that moves between cores: give several at once
constexpr uint64_t kSliceNs = 20'000'000;
constexpr auto kNap = std::chrono::milliseconds(1);
constexpr auto kLongestNap = std::chrono::milliseconds(16);
constexpr int kNapsBeforeIdle = 20;

}  // namespace

struct alignas(kCacheLineBytes) Rings::Slot {
  uint32_t sequence;  // published last; 1, 2, ... over all slots of the ring
  uint32_t bytes;     // of this chunk
  int64_t tag;
  uint64_t total_and_dtype;  // bytes of the message << 8 | DType
  uint64_t unused;
  uint8_t payload[kInlineMessageBytes];
};

// At the place of the ring from a rank to itself, which nobody needs.
struct Rings::Control {
  alignas(kCacheLineBytes) uint32_t bell;      // counts what could interest a sleeper: arrivals and credits
  alignas(kCacheLineBytes) uint32_t sleepers;  // threads of this rank that sleep on the bell
  struct alignas(kCacheLineBytes) Credit {
    uint32_t consumed;  // slots of the ring me -> dst that dst has emptied; written by dst
  } credits[kMaxWorld];
};

struct Rings::Message {
  int src;
  int64_t tag;
  DType dtype;
  size_t bytes;
  bool complete = false;
  std::unique_ptr<std::byte[]> data;
  Fetch fetch;  // of a message that another host holds
};

struct Rings::Incoming {
  uint32_t consumed = 0;
  uint32_t credited = 0;
  bool active = false;
  size_t total = 0, got = 0;
  std::byte* to = nullptr;
  std::shared_ptr<RingOp> op;
  Message* message = nullptr;
};

struct Rings::Outgoing {
  uint32_t sent = 0;
  uint32_t known_consumed = 0;
  std::deque<std::shared_ptr<RingOp>> queue;
};

Rings::Rings(Communicator& comm) : comm_(comm), me_(comm.rank()), world_(comm.world()) {
  static_assert(sizeof(Slot) == kCacheLineBytes && kRingSlots * sizeof(Slot) <= kHeaderBytes);
  static_assert(sizeof(Control) <= kHeaderBytes);
  block_bytes_ = comm.ring_region_bytes() / static_cast<size_t>(world_);
  chunk_bytes_ = (block_bytes_ - kHeaderBytes) / kRingSlots;
  out_.resize(static_cast<size_t>(world_));
  in_.resize(static_cast<size_t>(world_));
  wanted_.assign(static_cast<size_t>(comm.num_places()), 0);
}

Rings::~Rings() {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    stop_ = true;
    wake_background_.notify_all();
  }
  if (background_.joinable()) {
    ring_bell(me_, true);
    background_.join();
  }
  fail_all("the process group was destroyed while the operation was pending");
}

Rings::Slot& Rings::slot(int dst, int src, uint32_t sequence) const {
  std::byte* block = comm_.ring_region(dst) + static_cast<size_t>(src) * block_bytes_;
  return reinterpret_cast<Slot*>(block)[(sequence - 1) % kRingSlots];
}

std::byte* Rings::chunk(int dst, int src, uint32_t sequence) const {
  std::byte* block = comm_.ring_region(dst) + static_cast<size_t>(src) * block_bytes_;
  return block + kHeaderBytes + (sequence - 1) % kRingSlots * chunk_bytes_;
}

Rings::Control& Rings::control(int rank) const {
  return *reinterpret_cast<Control*>(comm_.ring_region(rank) + static_cast<size_t>(rank) * block_bytes_);
}

void Rings::ring_bell(int rank, bool always) {
  Control& theirs = control(rank);
  if (!always && std::atomic_ref<uint32_t>(theirs.sleepers).load(std::memory_order_seq_cst) == 0) return;
  std::atomic_ref<uint32_t>(theirs.bell).fetch_add(1, std::memory_order_seq_cst);
  futex_wake_all(theirs.bell);
}

uint32_t Rings::free_slots(int dst) {
  Outgoing& out = out_[static_cast<size_t>(dst)];
  uint32_t used = out.sent - out.known_consumed;
  if (used > kRingSlots / 2) {
    auto& word = control(me_).credits[dst].consumed;
    out.known_consumed = std::atomic_ref<uint32_t>(word).load(std::memory_order_seq_cst);
    used = out.sent - out.known_consumed;
  }
  return kRingSlots - used;
}

// Fills and publishes the next slot to dst. Pairs with drain() there. The sequence number and `sleepers` form a Dekker
// pair with a sleeper's announcement and its look at the sequence number: seq_cst on all four.
void Rings::publish(int dst, int64_t tag, const std::byte* data, size_t total, size_t moved, DType dtype) {
  const uint32_t sequence = ++out_[static_cast<size_t>(dst)].sent;
  Slot& head = slot(dst, me_, sequence);
  const size_t bytes = std::min(total - moved, chunk_bytes_);
  head.bytes = static_cast<uint32_t>(bytes);
  head.tag = tag;
  head.total_and_dtype = static_cast<uint64_t>(total) << 8 | static_cast<uint64_t>(dtype);
  if (bytes <= kInlineMessageBytes) {
    if (bytes != 0) std::memcpy(head.payload, data + moved, bytes);
  } else {
    copy_bytes(chunk(dst, me_, sequence), data + moved, bytes);
  }
  std::atomic_ref<uint32_t>(head.sequence).exchange(sequence, std::memory_order_seq_cst);
  ring_bell(dst, false);
}

bool Rings::try_send(int dst, int64_t tag, const void* data, size_t bytes, DType dtype) {
  std::lock_guard<std::mutex> lock(mutex_);
  Outgoing& out = out_[static_cast<size_t>(dst)];
  if (!out.queue.empty() || stop_ || comm_.aborted()) return false;
  const size_t num_chunks = std::max<size_t>(1, (bytes + chunk_bytes_ - 1) / chunk_bytes_);
  if (num_chunks > free_slots(dst)) return false;
  for (size_t i = 0; i < num_chunks; ++i) {
    publish(dst, tag, static_cast<const std::byte*>(data), bytes, i * chunk_bytes_, dtype);
  }
  return true;
}

bool Rings::try_recv(int src, int64_t tag, void* data, size_t bytes, DType dtype, int* source) {
  // Only the plain case: the message is the head of its ring, whole in one slot, and no other receive is before us.
  std::lock_guard<std::mutex> lock(mutex_);
  if (src >= world_ || !posted_.empty() || !unexpected_.empty() || stop_ || comm_.aborted()) return false;
  const int first = src == kAnySource ? 0 : src;
  const int last = src == kAnySource ? world_ - 1 : src;
  for (int s = first; s <= last; ++s) {
    Incoming& in = in_[static_cast<size_t>(s)];
    if (s == me_ || in.active) continue;
    const uint32_t next = in.consumed + 1;
    Slot& head = slot(me_, s, next);
    if (load_acquire(head.sequence) != next) continue;
    if (head.tag != tag || head.total_and_dtype >> 8 != bytes || head.bytes != bytes) continue;
    const auto their_dtype = static_cast<DType>(head.total_and_dtype & 0xff);
    if (their_dtype != dtype) continue;
    if (bytes != 0) {
      copy_bytes(data, bytes <= kInlineMessageBytes ? reinterpret_cast<std::byte*>(head.payload) : chunk(me_, s, next),
                 bytes);
    }
    in.consumed = next;
    give_credit(s, false);
    *source = s;
    return true;
  }
  return false;
}

void Rings::give_credit(int src, bool all) {
  Incoming& in = in_[static_cast<size_t>(src)];
  if (in.consumed - in.credited < (all ? 1 : kCreditSlots)) return;
  in.credited = in.consumed;
  auto& word = control(src).credits[me_].consumed;
  std::atomic_ref<uint32_t>(word).exchange(in.consumed, std::memory_order_seq_cst);
  ring_bell(src, false);
}

void Rings::post(const std::shared_ptr<RingOp>& op) {
  Ops finished;
  Fetch fetch;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    if (stop_) throw PeerError(comm_.rank_text(me_) + " of group '" + comm_.name() + "': the group was shut down");
    if (comm_.aborted()) comm_.check_alive(me_, text_of(*op), {});
    if (op->is_send) {
      out_[static_cast<size_t>(op->peer)].queue.push_back(op);
      pending_.push_back(op);
      push(op->peer, finished);
    } else {
      ++(op->peer == kAnySource ? wanted_any_ : wanted_[static_cast<size_t>(op->peer)]);
      pending_.push_back(op);
      if (!take_unexpected(op, finished, fetch)) posted_.push_back(op);
      for (int s = 0; s < world_; ++s) {
        if (s != me_ && (op->peer == kAnySource || op->peer == s)) drain(s, finished);
      }
    }
    if (!op->finished()) start_background();
  }
  report(finished);
  if (fetch) fetch_into(op, fetch);
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

void Rings::check_fits(const RingOp& op, int src, size_t bytes, DType dtype) const {
  const bool same_type = op.dtype == dtype || op.dtype == DType::bytes || dtype == DType::bytes;
  if (op.bytes == bytes && same_type) return;
  auto elements = [](size_t n, DType t) {
    return std::string(name_of(t)) + "[" + std::to_string(n / item_size(t)) + "]";
  };
  throw PeerError("group '" + comm_.name() + "': " + comm_.rank_text(src) + " sent " + elements(bytes, dtype) + " (" +
                  std::to_string(bytes) + " bytes, tag " + std::to_string(op.tag) + ") to " + comm_.rank_text(me_) +
                  ", which receives " + elements(op.bytes, op.dtype) + " (" + std::to_string(op.bytes) +
                  " bytes); send and recv must agree on size and type");
}

std::shared_ptr<RingOp> Rings::match(int src, int64_t tag) {
  for (auto it = posted_.begin(); it != posted_.end(); ++it) {
    if (((*it)->peer == kAnySource || (*it)->peer == src) && (*it)->tag == tag) {
      auto op = *it;
      posted_.erase(it);
      return op;
    }
  }
  return nullptr;
}

// The first chunk of a message: where shall it go? False: it stays in the ring.
bool Rings::begin_message(int src, const Slot& head, Ops& finished) {
  Incoming& in = in_[static_cast<size_t>(src)];
  const size_t total = head.total_and_dtype >> 8;
  const auto dtype = static_cast<DType>(head.total_and_dtype & 0xff);
  auto op = match(src, head.tag);
  if (op) {
    try {
      check_fits(*op, src, total, dtype);
    } catch (const PeerError& error) {
      comm_.abort(error.what());
      finish(op, std::current_exception(), finished);
      return false;
    }
    op->source = src;
    in.to = op->data;
    in.op = op;
    in.message = nullptr;
  } else {
    auto message = std::make_unique<Message>();
    message->src = src;
    message->tag = head.tag;
    message->dtype = dtype;
    message->bytes = total;
    message->data = std::make_unique_for_overwrite<std::byte[]>(std::max<size_t>(1, total));
    in.to = message->data.get();
    in.op = nullptr;
    in.message = message.get();
    unexpected_.push_back(std::move(message));
  }
  in.active = true;
  in.total = total;
  in.got = 0;
  return true;
}

// Takes what has arrived from src. Pairs with publish() there.
bool Rings::drain(int src, Ops& finished) {
  Incoming& in = in_[static_cast<size_t>(src)];
  bool moved = false;
  while (wanted_[static_cast<size_t>(src)] + wanted_any_ > 0) {
    const uint32_t next = in.consumed + 1;
    Slot& head = slot(me_, src, next);
    if (std::atomic_ref<uint32_t>(head.sequence).load(std::memory_order_seq_cst) != next) break;
    if (!in.active && !begin_message(src, head, finished)) return moved;
    if (head.bytes != 0) {
      const std::byte* from =
          head.bytes <= kInlineMessageBytes ? reinterpret_cast<std::byte*>(head.payload) : chunk(me_, src, next);
      copy_bytes(in.to + in.got, from, head.bytes);
    }
    in.got += head.bytes;
    in.consumed = next;
    moved = true;
    give_credit(src, false);
    if (in.got == in.total) {
      in.active = false;
      if (in.op) {
        finish(std::exchange(in.op, nullptr), nullptr, finished);
      } else {
        in.message->complete = true;
      }
    }
  }
  return moved;
}

// A receive that is posted after its message left the ring.
bool Rings::take_unexpected(const std::shared_ptr<RingOp>& op, Ops& finished, Fetch& fetch) {
  for (auto it = unexpected_.begin(); it != unexpected_.end(); ++it) {
    Message& message = **it;
    if ((op->peer != kAnySource && op->peer != message.src) || op->tag != message.tag) continue;
    try {
      check_fits(*op, message.src, message.bytes, message.dtype);
    } catch (const PeerError& error) {
      comm_.abort(error.what());
      finish(op, std::current_exception(), finished);
      return true;
    }
    op->source = message.src;
    if (message.src >= world_) {
      op->fetching = true;
      fetch = std::move(message.fetch);
      unexpected_.erase(it);
      return true;
    }
    Incoming& in = in_[static_cast<size_t>(message.src)];
    const size_t here = message.complete ? message.bytes : in.got;
    if (here != 0) copy_bytes(op->data, message.data.get(), here);
    if (message.complete) {
      finish(op, nullptr, finished);
    } else {  // the rest goes straight to its place
      in.op = op;
      in.to = op->data;
      in.message = nullptr;
    }
    unexpected_.erase(it);
    return true;
  }
  return false;
}

bool Rings::push(int dst, Ops& finished) {
  Outgoing& out = out_[static_cast<size_t>(dst)];
  bool moved = false;
  while (!out.queue.empty() && free_slots(dst) > 0) {
    const auto op = out.queue.front();
    publish(dst, op->tag, op->data, op->bytes, op->moved, op->dtype);
    op->moved += std::min(op->bytes - op->moved, chunk_bytes_);
    moved = true;
    if (op->moved == op->bytes) {
      out.queue.pop_front();
      finish(op, nullptr, finished);
    }
  }
  return moved;
}

void Rings::finish(const std::shared_ptr<RingOp>& op, std::exception_ptr error, Ops& finished) {
  if (!op->is_send) --(op->peer == kAnySource ? wanted_any_ : wanted_[static_cast<size_t>(op->peer)]);
  pending_.erase(std::find(pending_.begin(), pending_.end(), op));
  op->error = std::move(error);
  finished.push_back(op);
}

// Tells the owners, outside the lock: a callback may post again.
void Rings::report(const Ops& finished) {
  for (const auto& op : finished) {
    if (op->on_done) std::exchange(op->on_done, nullptr)(op->error);
    op->state.store(op->error ? RingOp::failed : RingOp::done, std::memory_order_seq_cst);
  }
  if (!finished.empty()) ring_bell(me_, false);  // another thread of this rank may sleep until one of these is done
}

bool Rings::progress(Ops& finished) {
  bool moved = false;
  for (int r = 0; r < world_; ++r) {
    const auto i = static_cast<size_t>(r);
    if (!out_[i].queue.empty()) moved |= push(r, finished);
    if (wanted_[i] + wanted_any_ > 0 && r != me_) moved |= drain(r, finished);
  }
  const uint64_t now = now_ns();
  if (now - checked_ns_ > kSliceNs) {
    checked_ns_ = now;
    check_pending(finished);
  }
  return moved;
}

std::string Rings::text_of(const RingOp& op) const {
  return std::string(op.is_send ? "send(" : "recv(") + name_of(op.dtype) + "[" +
         std::to_string(op.bytes / item_size(op.dtype)) + "], tag " + std::to_string(op.tag) +
         (op.is_send ? ") to " : ") from ") + (op.peer == kAnySource ? "any rank" : comm_.rank_text(op.peer));
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
  for (auto& out : out_) out.queue.clear();
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
  uint64_t spin_until = now_ns() + comm_.spin_ns();
  uint32_t& bell = control(me_).bell;
  while (!op->finished()) {
    if (waiting.asleep) {
      const uint32_t seen = std::atomic_ref<uint32_t>(bell).load(std::memory_order_seq_cst);
      if (!advance() && !op->finished()) futex_sleep(bell, seen, kSliceNs);
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
      if (!moved) futex_sleep(own.bell, seen, kSliceNs);
      lock.lock();
    }
    sleepers.fetch_sub(1, std::memory_order_seq_cst);
  }
}

}  // namespace pypar
