#include "comm/communicator.h"

#include <algorithm>
#include <cstring>
#include <numeric>

#include "comm/call.h"
#include "cpu/reduce.h"
#include "pypar/signal.h"

namespace pypar {

namespace {

constexpr uint64_t kMagic = 0x7061727079703032ull;
constexpr uint32_t kAbi = 2;
constexpr size_t kPageBytes = 4096;
constexpr size_t kRingsAt = kPageBytes + Windows::kTableBytes;
// Larger than a core's L2, so that a slot has left the peer's cache when it is written again: docs/design/0002.
constexpr size_t kSlotBytes = 1u << 20;
// Where copies write lines without reading them first that does not matter, and small chunks overlap sooner.
constexpr size_t kUnreadChunkBytes = 256u << 10;
constexpr uint64_t kSpinNs = 100'000;
constexpr uint64_t kBackgroundSpinNs = 2'000;

static_assert(sizeof(ControlHeader) <= kPageBytes);

thread_local bool background_thread = false;
thread_local const Communicator* handler_in = nullptr;  // in whose wait this thread runs a signal handler
std::atomic<void (*)(int, uint32_t)> stall_hook{nullptr};

void stall(int rank, uint32_t round) {
  if (auto* hook = stall_hook.load(std::memory_order_relaxed)) hook(rank, round);
}

size_t ring_region(int world) {
  return static_cast<size_t>(world) * (kRingHeaderBytes + kRingDataBytes);
}

}  // namespace

void stall_at(int rank, uint32_t round) {
  stall(rank, round);
}

Deadline Deadline::after(std::chrono::milliseconds timeout) {
  if (timeout.count() <= 0) return {};
  const auto ms = static_cast<uint64_t>(timeout.count());
  return {now_ns() + ms * 1'000'000, ms};
}

size_t Communicator::segment_bytes(int world) {
  return kRingsAt + pypar::ring_region(world) + kSlots * kSlotBytes;
}

Communicator::Communicator(std::unique_ptr<Mesh> mesh) : mesh_(std::move(mesh)), gone_(mesh_->group_ranks.size()) {
  if (world() > kMaxWorld) {
    throw ArgumentError("group '" + name() + "' has " + std::to_string(world()) + " ranks on this host; at most " +
                        std::to_string(kMaxWorld) + " can share memory");
  }
  slot_bytes_ = kSlotBytes;
  chunk_bytes_ = copies_without_reading() ? kUnreadChunkBytes : kSlotBytes;
  ring_bytes_ = pypar::ring_region(world());
  spin_ns_ = world() > mesh_->num_cores ? 0 : kSpinNs;
  seen_.assign(static_cast<size_t>(world()), 0);
  std::vector<Windows::Entry*> tables;
  for (int r = 0; r < world(); ++r) {
    std::byte* base = mesh_->bases[static_cast<size_t>(r)];
    heads_.push_back(reinterpret_cast<ControlHeader*>(base));
    tables.push_back(reinterpret_cast<Windows::Entry*>(base + kPageBytes));
    slots_.push_back(base + kRingsAt + ring_bytes_);
  }
  windows_ = std::make_unique<Windows>(rank(), std::move(tables));
  ControlHeader& own = *heads_[static_cast<size_t>(rank())];
  own.abi = kAbi;
  own.rank = static_cast<uint32_t>(rank());
  own.world = static_cast<uint32_t>(world());
  own.slot_bytes = static_cast<uint32_t>(slot_bytes_);
  own.bytes = segment_bytes(world());
  std::atomic_ref<uint64_t>(own.magic).store(kMagic, std::memory_order_release);
}

Communicator::~Communicator() {
  leave();
}

std::string Communicator::rank_text(int place) const {
  return "rank " + std::to_string(group_rank(place));
}

std::byte* Communicator::ring_region(int rank) const {
  return mesh_->bases[static_cast<size_t>(rank)] + kRingsAt;
}

uint64_t Communicator::spin_ns() const {
  return background_thread ? std::min(spin_ns_, kBackgroundSpinNs) : spin_ns_;
}

void Communicator::set_background_thread(bool background) {
  background_thread = background;
}

void Communicator::set_stall(void (*stall)(int, uint32_t)) {
  stall_hook = stall;
}

void Communicator::check_alive(int peer, const std::string& what, Deadline deadline) const {
  ControlHeader& own = *heads_[static_cast<size_t>(rank())];
  if (load_acquire(own.aborted) == 2) throw PeerError(own.reason);
  const std::string where = rank_text(rank()) + " of group '" + name() + "' in " + what + ": ";
  for (int r = 0; r < world(); ++r) {
    if (r == rank() || (peer >= 0 && r != peer)) continue;
    if (has_left(r)) throw PeerError(where + rank_text(r) + kHasLeft);
    if (!mesh_->alive(r)) {
      throw PeerError(where + rank_text(r) + " (process " + std::to_string(mesh_->pids[static_cast<size_t>(r)]) +
                      ") is dead; its own output says why");
    }
  }
  if (peer >= world() && gone_[static_cast<size_t>(peer)]) throw PeerError(where + rank_text(peer) + kHasLeft);
  if (deadline.at_ns != 0 && now_ns() >= deadline.at_ns) {
    throw PeerError(where + "waited " + std::to_string(deadline.timeout_ms) + " ms" +
                    (peer >= 0 ? " for " + rank_text(peer) : "") +
                    ", the timeout of the group; a rank skipped the call, is stuck, or needs a longer timeout");
  }
}

void Communicator::check_interrupt(const std::string& what) const {
  struct Inside {
    const Communicator* outer = handler_in;
    explicit Inside(const Communicator* now) { handler_in = now; }
    ~Inside() { handler_in = outer; }
  } inside(this);
  try {
    pypar::check_interrupt([&] { return interrupted_text() + " in " + what; });
  } catch (const Interrupted& error) {
    abort(error.what());
    throw;
  }
}

std::string Communicator::interrupted_text() const {
  return rank_text(rank()) + " of group '" + name() + "' was interrupted";
}

bool Communicator::in_handler() const {
  return handler_in == this;
}

void Communicator::refuse_in_handler() const {
  if (!in_handler()) return;
  throw PeerError(
      rank_text(rank()) + " of group '" + name() +
      "': a signal handler made a call while this thread waits in a call of the same group; let the handler "
      "raise an exception or set a flag");
}

void Communicator::abort(const std::string& reason) const {
  for (ControlHeader* head : heads_) {
    uint32_t none = 0;
    if (!std::atomic_ref<uint32_t>(head->aborted).compare_exchange_strong(none, 1)) continue;  // the first reason stays
    std::strncpy(head->reason, reason.c_str(), sizeof head->reason - 1);
    std::atomic_ref<uint32_t>(head->aborted).store(2, std::memory_order_release);
  }
}

bool Communicator::aborted() const {
  return load_acquire(heads_[static_cast<size_t>(rank())]->aborted) == 2;
}

void Communicator::set_flush(std::function<void()> flush) {
  std::lock_guard<std::mutex> lock(flush_mutex_);
  flush_ = std::move(flush);
}

void Communicator::flush() {
  refuse_in_handler();
  std::lock_guard<std::mutex> lock(flush_mutex_);
  if (flush_) flush_();
}

std::string Communicator::reason() const {
  return aborted() ? heads_[static_cast<size_t>(rank())]->reason : "";
}

void Communicator::leave(uint64_t calls) {
  if (has_left(rank())) return;
  ControlHeader& own = *heads_[static_cast<size_t>(rank())];
  own.left_after = calls;
  std::atomic_ref<uint32_t>(own.left).store(1, std::memory_order_release);
}

bool Communicator::has_left(int rank) const {
  return load_acquire(heads_[static_cast<size_t>(rank)]->left) != 0;
}

std::shared_ptr<Window> Communicator::rendezvous(int fd, std::byte* base, size_t bytes, Deadline deadline) {
  auto window = std::make_shared<Window>();
  guarded([&] {
    Call call(*this, Op::rendezvous, DType::bytes, ReduceOp::none, bytes, 0, deadline);
    call.agree(call.next());
    window->bytes = bytes;
    const uint64_t timeout_ms = deadline.at_ns == 0 ? 3'600'000 : deadline.timeout_ms;
    const auto theirs = mesh_->exchange_fds(fd, reinterpret_cast<uint64_t>(base), timeout_ms);
    for (int r = 0; r < world(); ++r) {
      const auto& [their_fd, their_base] = theirs[static_cast<size_t>(r)];
      window->mapped.push_back(r == rank() ? Segment() : Segment::map(their_fd, bytes));
      // Ranks that are threads of one process share addresses (and ThreadSanitizer sees them as one memory).
      const bool same_process =
          r != rank() && mesh_->pids[static_cast<size_t>(r)] == mesh_->pids[static_cast<size_t>(rank())];
      window->bases.push_back(r == rank()    ? base
                              : same_process ? reinterpret_cast<std::byte*>(their_base)
                                             : window->mapped.back().data());
    }
    windows_->add(base, window);
  });
  return window;
}

std::vector<Segment> Communicator::exchange_memory(int fd, const std::vector<int64_t>& sizes, Deadline deadline) {
  std::vector<Segment> memory(static_cast<size_t>(world()));
  guarded([&] {
    const auto total = static_cast<uint64_t>(std::accumulate(sizes.begin(), sizes.end(), int64_t{0}));
    Call call(*this, Op::rendezvous, DType::bytes, ReduceOp::none, total, hash_sizes(sizes.data(), world()), deadline);
    call.agree(call.next());
    const uint64_t timeout_ms = deadline.at_ns == 0 ? 3'600'000 : deadline.timeout_ms;
    const auto theirs = mesh_->exchange_fds(fd, 0, timeout_ms);
    for (int r = 0; r < world(); ++r) {
      if (r == rank()) continue;
      memory[static_cast<size_t>(r)] =
          Segment::map(theirs[static_cast<size_t>(r)].first,
                       static_cast<size_t>(std::max<int64_t>(sizes[static_cast<size_t>(r)], 1)));
    }
  });
  return memory;
}

Communicator::Call::Call(Communicator& communicator, Op op, DType dtype, ReduceOp reduce_op, uint64_t count,
                         uint64_t detail, Deadline deadline)
    : c(communicator), me(communicator.rank()), world(communicator.world()), deadline(deadline), lock(c.mutex_) {
  header.op = op;
  header.dtype = dtype;
  header.reduce_op = reduce_op;
  header.count = count;
  header.detail = detail;
  ++c.calls_;
  ControlHeader& own = *c.heads_[static_cast<size_t>(me)];
  if (load_acquire(own.aborted) == 2) throw PeerError(own.reason);
}

uint32_t Communicator::Call::next() {
  const uint32_t round = c.heads_[static_cast<size_t>(me)]->epoch + 1;
  for (int peer = 0; peer < world; ++peer) {
    if (peer != me && !reached(c.seen_[static_cast<size_t>(peer)], round - 2)) wait(peer, round - 2);
  }
  return round;
}

void Communicator::Call::publish(uint32_t round) {
  ControlHeader& own = *c.heads_[static_cast<size_t>(me)];
  stall(me, round);
  own.epoch = round;
  notify(own.lines[round % kSlots].epoch, round, own.sleepers);
}

void Communicator::Call::wait(int peer, uint32_t round) {
  uint32_t& seen = c.seen_[static_cast<size_t>(peer)];
  if (!reached(seen, round)) {
    ControlHeader& head = *c.heads_[static_cast<size_t>(peer)];
    uint32_t& epoch = head.lines[round % kSlots].epoch;
    wait_signal(epoch, round, head.sleepers, c.spin_ns(), [&] {
      c.check_interrupt(call_text());
      c.check_alive(peer, call_text(), deadline);
    });
    seen = round;
  }
  stall(me, round);
}

void Communicator::Call::wait_all(uint32_t round) {
  for (int i = 1; i < world; ++i) wait((me + i) % world, round);
}

void Communicator::Call::sync() {
  const uint32_t round = next();
  publish(round);
  wait_all(round);
}

void Communicator::Call::publish_header(uint32_t round) {
  Line& own = c.heads_[static_cast<size_t>(me)]->lines[round % kSlots];
  std::memcpy(reinterpret_cast<char*>(&own) + sizeof own.epoch, reinterpret_cast<char*>(&header) + sizeof own.epoch,
              sizeof own - sizeof own.epoch);
  publish(round);
}

void Communicator::Call::compare_headers(uint32_t round) {
  wait_all(round);
  const bool same = all_lines(round, [](const Line& mine, const Line& theirs) {
    return mine.op == theirs.op && mine.dtype == theirs.dtype && mine.reduce_op == theirs.reduce_op &&
           mine.count == theirs.count && mine.detail == theirs.detail;
  });
  if (same) return;
  std::string text = "the ranks of group '" + c.name() + "' disagree:";
  for (int r = 0; r < world; ++r) {
    text += (r == 0 ? " " : ", ") + c.rank_text(r) + " called " + describe(r, r == me ? header : line(r, round));
  }
  throw PeerError(text + "; every rank must make the same calls in the same order, on equal sizes and types");
}

bool Communicator::Call::all_lines(uint32_t round, bool (*holds)(const Line&, const Line&)) const {
  for (int r = 0; r < world; ++r) {
    if (!holds(header, r == me ? header : line(r, round))) return false;
  }
  return true;
}

std::string Communicator::Call::describe(int rank, const Line& line) const {
  std::string text = name_of(line.op);
  if (line.op == Op::barrier) return text;
  const char* unit = name_of(line.dtype);
  text += std::string("(") + unit + "[" + std::to_string(line.count) + "]";
  if (line.reduce_op != ReduceOp::none) text += std::string(", ") + name_of(line.reduce_op);
  const bool rooted =
      line.op == Op::broadcast || line.op == Op::reduce || line.op == Op::gather || line.op == Op::scatter;
  if (rooted) text += ", root " + std::to_string(c.mesh_->group_ranks[static_cast<size_t>(line.detail)]);
  static_cast<void>(rank);
  return text + ")";
}

std::string Communicator::Call::call_text() const {
  return describe(me, header) + ", call " + std::to_string(c.calls_);
}

}  // namespace pypar
