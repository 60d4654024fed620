// Point-to-point messages over shared memory.
//
// One ring of slots per ordered pair, in the receiver's segment: the sender pushes, the receiver polls only its own
// memory. A slot is a header of one cache line (sequence number, published last; tag, sizes; small payloads ride in it)
// and a chunk of data. Credits come back as one counter per pair in the *sender's* segment. Messages of a pair travel
// in the order of their sends, chunk by chunk, so that a message may be larger than the ring. A large message that lies
// in symmetric memory takes one slot, which says where: the receiver copies it from there, once, and the credit for the
// slot completes the send.
//
// Matching is MPI's: by source (or any) and tag, in order. The head of a ring that no posted receive wants stays where
// it is until a receive from that source with another tag is posted; then it moves to the heap, so that no tag blocks
// another.
//
// Progress: whoever waits moves everybody's messages. When operations are pending and nobody waits for a millisecond, a
// background thread takes over, so that an isend can't starve behind an unrelated blocking call.
#pragma once

#include <atomic>
#include <condition_variable>
#include <deque>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "comm/communicator.h"

namespace pypar {

inline constexpr int kAnySource = -1;

// One posted send or receive that could not complete at once.
struct RingOp {
  bool is_send = false;
  int peer = kAnySource;  // a place of the communicator; a send's is on this host
  int64_t tag = 0;
  std::byte* data = nullptr;
  size_t bytes = 0;
  DType dtype = DType::bytes;
  Deadline deadline;
  std::function<void(std::exception_ptr)> on_done;  // called once by whoever completes it, without locks; owns data

  enum State : uint32_t { pending, done, failed };
  std::atomic<uint32_t> state{pending};
  int source = kAnySource;   // of a completed receive
  std::exception_ptr error;  // of a failed one
  size_t moved = 0;          // bytes of a send that are in the ring already
  uint64_t window = 0;       // of a send: where it lies in symmetric memory, if the receiver shall copy it from there

  bool fetching = false;  // of a receive: another host's message is on its way to `data`

  bool finished() const { return state.load(std::memory_order_seq_cst) != pending; }
};

class Rings {
 public:
  explicit Rings(Communicator& comm);
  ~Rings();
  Rings(const Rings&) = delete;

  // Completes in the calling thread if there is room (a message is there) now; false: post it.
  bool try_send(int dst, int64_t tag, const void* data, size_t bytes, DType dtype);
  bool try_recv(int src, int64_t tag, void* data, size_t bytes, DType dtype, int* source);
  // The operation is the group's until it is finished: it fails when its deadline passes or its peer is gone.
  void post(const std::shared_ptr<RingOp>& op);
  // Returns when op is finished and throws its error. `deadline`: of this wait alone; when it passes, the group ends.
  void wait(const std::shared_ptr<RingOp>& op, Deadline deadline = {});
  // False: the deadline passed first; op is still pending.
  bool wait_until(const std::shared_ptr<RingOp>& op, Deadline deadline);
  // Withdraws an operation that has not begun to move, without hurting the group. False: too late.
  bool cancel(const std::shared_ptr<RingOp>& op, const std::string& why);
  // Every pending operation fails with `why`.
  void fail_all(const std::string& why);
  // A message from a rank of another host is there for the receive that matches it, now or later; that one's thread
  // calls fetch(data), which returns when the message is at its place or throws.
  using Fetch = std::function<void(std::byte*)>;
  void announce(int src, int64_t tag, size_t bytes, DType dtype, Fetch fetch);
  int group_rank(int place) const { return place == kAnySource ? place : comm_.group_rank(place); }

 private:
  struct Slot;
  struct Control;
  struct Message;   // that no receive wanted yet, on the heap
  struct Incoming;  // the message that is arriving from one source
  struct Outgoing;
  using Ops = std::vector<std::shared_ptr<RingOp>>;

  Slot& slot(int dst, int src, uint32_t sequence) const;
  std::byte* chunk(int dst, int src, uint32_t sequence) const;
  Control& control(int rank) const;
  uint32_t free_slots(int dst);
  void publish(int dst, int64_t tag, const std::byte* data, size_t total, size_t moved, DType dtype);
  void publish_window(const std::shared_ptr<RingOp>& op);
  void publish_slot(int dst, Slot& head, uint32_t sequence);
  bool complete_announced(int dst, Ops& finished);
  void copy_out(int src, const Slot& head, const std::byte* chunk, std::byte* to);
  static size_t bytes_of(const Slot& head);
  void ring_bell(int rank, bool always);
  void give_credit(int src, bool all);

  bool progress(Ops& finished);  // the caller holds mutex_
  bool push(int dst, Ops& finished);
  bool drain(int src, Ops& finished);
  bool begin_message(int src, const Slot& head, Ops& finished);
  bool take_unexpected(const std::shared_ptr<RingOp>& op, Ops& finished, Fetch& fetch);
  void fetch_into(const std::shared_ptr<RingOp>& op, const Fetch& fetch);
  std::shared_ptr<RingOp> match(int src, int64_t tag);
  void check_fits(const RingOp& op, int src, size_t bytes, DType dtype) const;
  void finish(const std::shared_ptr<RingOp>& op, std::exception_ptr error, Ops& finished);
  void check_pending(Ops& finished);
  void fail_pending(std::exception_ptr error, Ops& finished);
  void report(const Ops& finished);
  std::string text_of(const RingOp& op) const;
  void run_background();
  void start_background();

  Communicator& comm_;
  const int me_;
  const int world_;
  size_t block_bytes_;
  size_t chunk_bytes_;
  std::vector<Outgoing> out_;
  std::vector<Incoming> in_;
  std::deque<std::shared_ptr<RingOp>> posted_;  // receives without a message, in order
  std::deque<std::unique_ptr<Message>> unexpected_;
  std::vector<std::shared_ptr<RingOp>> pending_;
  std::vector<int> wanted_;  // receives pending per source
  int wanted_any_ = 0;
  int waiters_ = 0;
  uint64_t checked_ns_ = 0;
  std::mutex mutex_;

  std::thread background_;
  std::condition_variable wake_background_;
  bool background_idle_ = false;
  bool stop_ = false;
};

}  // namespace pypar
