// Slots, credits and matching. When messages move is in rings_progress.cpp.

#include <algorithm>
#include <cstring>
#include <utility>

#include "comm/rings_layout.h"
#include "cpu/reduce.h"

namespace pypar {

namespace {

constexpr uint32_t kCreditSlots = kRingSlots / 4;  // a credit is a line that moves between cores: give several at once
// From here a message that lies in symmetric memory is copied once, by its receiver.
constexpr size_t kAnnouncedBytes = 64u << 10;

}  // namespace

Rings::Rings(Communicator& comm) : comm_(comm), me_(comm.rank()), world_(comm.world()) {
  static_assert(sizeof(Slot) == kCacheLineBytes && kRingSlots * sizeof(Slot) <= kRingHeaderBytes);
  static_assert(sizeof(Control) <= kRingHeaderBytes);
  block_bytes_ = comm.ring_region_bytes() / static_cast<size_t>(world_);
  chunk_bytes_ = (block_bytes_ - kRingHeaderBytes) / kRingSlots;
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
  return block + kRingHeaderBytes + (sequence - 1) % kRingSlots * chunk_bytes_;
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

// The sequence number and `sleepers` form a Dekker pair with a sleeper's announcement and its look at the sequence
// number: seq_cst on all four. Pairs with drain() there.
void Rings::publish_slot(int dst, Slot& head, uint32_t sequence) {
  std::atomic_ref<uint32_t>(head.sequence).exchange(sequence, std::memory_order_seq_cst);
  ring_bell(dst, false);
}

// Fills and publishes the next slot to dst.
void Rings::publish(int dst, int64_t tag, const std::byte* data, size_t total, size_t moved, DType dtype) {
  const uint32_t sequence = ++out_[static_cast<size_t>(dst)].sent;
  Slot& head = slot(dst, me_, sequence);
  const size_t bytes = std::min(total - moved, chunk_bytes_);
  head.bytes = static_cast<uint32_t>(bytes);
  head.tag = tag;
  head.total_and_dtype = static_cast<uint64_t>(total) << 8 | static_cast<uint64_t>(dtype);
  head.window = 0;
  if (bytes <= kInlineMessageBytes) {
    if (bytes != 0) std::memcpy(head.payload, data + moved, bytes);
  } else {
    copy_bytes(chunk(dst, me_, sequence), data + moved, bytes);
  }
  publish_slot(dst, head, sequence);
}

// Publishes a slot that says where the message lies. The window is pinned at the receiver.
void Rings::publish_window(const std::shared_ptr<RingOp>& op) {
  Outgoing& out = out_[static_cast<size_t>(op->peer)];
  const uint32_t sequence = ++out.sent;
  Slot& head = slot(op->peer, me_, sequence);
  head.bytes = 0;
  head.tag = op->tag;
  head.total_and_dtype = static_cast<uint64_t>(op->bytes) << 8 | static_cast<uint64_t>(op->dtype);
  head.window = op->window;
  op->moved = op->bytes;
  out.announced.emplace_back(sequence, op);
  publish_slot(op->peer, head, sequence);
}

// The receiver has emptied the slot: the message may change again.
bool Rings::complete_announced(int dst, Ops& finished) {
  Outgoing& out = out_[static_cast<size_t>(dst)];
  if (out.announced.empty()) return false;
  auto& word = control(me_).credits[dst].consumed;
  out.known_consumed = std::atomic_ref<uint32_t>(word).load(std::memory_order_seq_cst);
  bool moved = false;
  while (!out.announced.empty() && reached(out.known_consumed, out.announced.front().first)) {
    const auto op = out.announced.front().second;
    out.announced.pop_front();
    finish(op, nullptr, finished);
    moved = true;
  }
  return moved;
}

size_t Rings::bytes_of(const Slot& head) {
  return head.window != 0 ? head.total_and_dtype >> 8 : head.bytes;
}

// What a slot holds, or says where it lies.
void Rings::copy_out(int src, const Slot& head, const std::byte* chunk, std::byte* to) {
  if (head.window != 0) {
    copy_bytes(to, comm_.windows().at(head.window, src), bytes_of(head));
    comm_.windows().unpin(head.window);
  } else if (head.bytes != 0) {
    copy_bytes(to, head.bytes <= kInlineMessageBytes ? reinterpret_cast<const std::byte*>(head.payload) : chunk,
               head.bytes);
  }
}

bool Rings::try_send(int dst, int64_t tag, const void* data, size_t bytes, DType dtype) {
  std::lock_guard<std::mutex> lock(mutex_);
  Outgoing& out = out_[static_cast<size_t>(dst)];
  if (!out.queue.empty() || stop_ || comm_.aborted()) return false;
  if (bytes >= kAnnouncedBytes && comm_.windows().find(data, bytes) != 0) return false;  // not done at once: post it
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
    if (head.tag != tag || head.total_and_dtype >> 8 != bytes || bytes_of(head) != bytes) continue;
    const auto their_dtype = static_cast<DType>(head.total_and_dtype & 0xff);
    if (their_dtype != dtype) continue;
    copy_out(s, head, chunk(me_, s, next), static_cast<std::byte*>(data));
    in.consumed = next;
    give_credit(s, head.window != 0);
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
      if (op->bytes >= kAnnouncedBytes) op->window = comm_.windows().find(op->data, op->bytes);
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
    copy_out(src, head, chunk(me_, src, next), in.to + in.got);
    in.got += bytes_of(head);
    in.consumed = next;
    moved = true;
    give_credit(src, head.window != 0);
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
    if (op->window != 0 && comm_.windows().pin(op->window, dst)) {
      out.queue.pop_front();
      publish_window(op);
      moved = true;
      continue;
    }
    op->window = 0;  // the receiver has freed its part
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

std::string Rings::text_of(const RingOp& op) const {
  return std::string(op.is_send ? "send(" : "recv(") + name_of(op.dtype) + "[" +
         std::to_string(op.bytes / item_size(op.dtype)) + "], tag " + std::to_string(op.tag) +
         (op.is_send ? ") to " : ") from ") + (op.peer == kAnySource ? "any rank" : comm_.rank_text(op.peer));
}

}  // namespace pypar
