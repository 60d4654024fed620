// The ranks of one group that share memory, and the blocking collectives between them.
//
// A Communicator is one "channel" in the sense of the protocol: calls are made one at a time (the methods take a lock),
// in the same order on every rank. Every call is a row of rounds. In round m a rank stages its bytes in its own slot
// m % kSlots and publishes m in its line; a peer that sees m may read them. A rank publishes m only after it has
// consumed every round up to m - 2, so a slot is free again when all peers published m - 2: no EMPTY signals.
// The first round of a call carries a header (what is called, on what); every rank compares all headers, so that a
// mismatch is seen by all ranks in the same round, and which algorithm runs is a pure function of the headers.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "comm/bootstrap.h"
#include "comm/interrupt.h"
#include "comm/types.h"
#include "comm/windows.h"

namespace pypar {

inline constexpr int kSlots = 4;
inline constexpr int kMaxWorld = 256;
inline constexpr size_t kInlineBytes = 32;
inline constexpr size_t kRingHeaderBytes = 64u << 10;  // of a point-to-point ring, then
inline constexpr size_t kRingDataBytes = 2u << 20;
inline constexpr const char* kHasLeft = " has left the group; did it finish early or skip a call?";

// One cache line: everything a peer must know of a small call in a single transfer.
struct alignas(64) Line {
  uint32_t epoch;
  Op op;
  DType dtype;
  ReduceOp reduce_op;
  uint8_t staged;   // the slot of this round holds data
  uint64_t count;   // elements
  uint64_t detail;  // root, or a hash of the split sizes
  uint64_t window;  // its place, if it is a symmetric tensor: see windows.h
  uint8_t payload[kInlineBytes];
};
static_assert(sizeof(Line) == 64);

struct ControlHeader {
  uint64_t magic;  // published last
  uint32_t abi;
  uint32_t rank;
  uint32_t world;
  uint32_t slot_bytes;
  uint64_t bytes;
  alignas(64) uint32_t aborted;  // 0, 1 = being written, 2 = `reason` is valid
  char reason[508];
  alignas(64) uint32_t left;      // the rank closed its end in good order
  uint64_t left_after;            // calls between hosts that it had made by then
  alignas(64) uint32_t sleepers;  // waiters asleep on this rank's lines
  alignas(64) uint32_t epoch;     // rounds this rank published; lives in memory, only its owner writes it
  Line lines[kSlots];
};

// When a wait ends. A default-made one never does.
struct Deadline {
  uint64_t at_ns = 0;
  uint64_t timeout_ms = 0;
  static Deadline after(std::chrono::milliseconds timeout);
};

// How the ranks' shares of rows are added: ReduceOp::sum, in rank order, or ReduceOp::tree, ((0 + 1) + (2 + 3)) + ...,
// for ranks that are a power of two. facts: what else all ranks must give alike, in one number.
struct RowSum {
  ReduceOp order = ReduceOp::sum;
  uint64_t facts = 0;
};

class Communicator {
 public:
  // Collective over the mesh.
  explicit Communicator(std::unique_ptr<Mesh> mesh);
  ~Communicator();
  Communicator(const Communicator&) = delete;

  int rank() const { return mesh_->rank; }
  int world() const { return mesh_->world; }
  const std::string& name() const { return mesh_->name; }
  // Ranks of the group have a place here: those of this host 0 .. world() - 1, those of other hosts behind them.
  int num_places() const { return static_cast<int>(mesh_->group_ranks.size()); }
  int group_rank(int place) const { return mesh_->group_ranks[static_cast<size_t>(place)]; }

  void barrier(Deadline deadline);
  // out = reduce over ranks of in, on every rank. in == out is allowed; other overlap isn't.
  void all_reduce(const void* in, void* out, int64_t count, DType dtype, ReduceOp op, Deadline deadline);
  // ins[d]: what rank d shall get, counts[d] elements; out: counts[rank()] elements.
  void reduce_scatter(const void* const* ins, const int64_t* counts, void* out, DType dtype, ReduceOp op,
                      Deadline deadline);
  // The same, reduced as the caller likes: reduce(begin, num, srcs) gets elements [begin, begin + num) of this rank's
  // part, of every rank in rank order.
  using ReduceItems = std::function<void(int64_t begin, int64_t num, const void* const* srcs)>;
  void reduce_scatter(const void* const* ins, const int64_t* counts, const ReduceItems& reduce, DType dtype,
                      ReduceOp op, Deadline deadline);
  // outs[s]: what rank s gives, bytes[s] of it. `in` holds bytes[rank()].
  // `dtype` here and below is compared across ranks and named in errors; sizes are in bytes all the same.
  void all_gather(const void* in, const int64_t* bytes, void* const* outs, Deadline deadline,
                  DType dtype = DType::bytes);
  // Rank d gets send_bytes[d] bytes from ins[d]; recv_bytes[s] from rank s go to outs[s].
  void all_to_all(const void* const* ins, const int64_t* send_bytes, void* const* outs, const int64_t* recv_bytes,
                  Deadline deadline, DType dtype = DType::bytes);
  void broadcast(void* data, int64_t bytes, int root, Deadline deadline, DType dtype = DType::bytes);
  // `out` may be null on ranks other than root.
  void reduce(const void* in, void* out, int64_t count, DType dtype, ReduceOp op, int root, Deadline deadline);
  // outs is read on root only; every rank gives `bytes`.
  void gather(const void* in, int64_t bytes, void* const* outs, int root, Deadline deadline,
              DType dtype = DType::bytes);
  void scatter(const void* const* ins, int64_t bytes, void* out, int root, Deadline deadline,
               DType dtype = DType::bytes);

  // The same with a matmul at one end, a piece of whole rows at a time: the rows are used where they lie, or made where
  // they are needed. The pieces are the same on every rank and in every run; `rows`: how many each rank holds or gets.
  // consume(src, begin, num, data): rows [begin, begin + num) of src. Own rows come first, while the others' arrive.
  using ConsumeRows = std::function<void(int src, int64_t begin, int64_t num, const void* data)>;
  void all_gather_rows(const void* in, const int64_t* rows, int64_t row_items, const ConsumeRows& consume,
                       Deadline deadline, DType dtype);
  // produce(dst, begin, num, data): writes this rank's share of rows [begin, begin + num) of dst. more(begin, num,
  // srcs) may append what is added to those rows of `out` after the ranks' shares, before the one rounding; null:
  // nothing.
  using ProduceRows = std::function<void(int dst, int64_t begin, int64_t num, void* data)>;
  using MoreRows = std::function<void(int64_t begin, int64_t num, std::vector<const void*>& srcs)>;
  void reduce_scatter_rows(const int64_t* rows, int64_t row_items, const ProduceRows& produce, void* out,
                           const MoreRows& more, Deadline deadline, DType dtype, RowSum how = {});
  // Every rank gets the sum of all `rows` rows.
  using MakeRows = std::function<void(int64_t begin, int64_t num, void* data)>;
  void all_reduce_rows(int64_t rows, int64_t row_items, const MakeRows& produce, void* out, const MoreRows& more,
                       Deadline deadline, DType dtype, RowSum how = {});

  // Collective: makes [base, base + bytes) of `fd` a symmetric window; all ranks give the same size.
  std::shared_ptr<Window> rendezvous(int fd, std::byte* base, size_t bytes, Deadline deadline);
  Windows& windows() { return *windows_; }
  // Collective: the memory behind everybody's fd, mapped, in rank order; nothing at the own rank. sizes[r]: bytes that
  // rank r gives (at least a page), the same list on every rank.
  std::vector<Segment> exchange_memory(int fd, const std::vector<int64_t>& sizes, Deadline deadline);

  // Bytes of each rank's control segment on a host of `world` ranks.
  static size_t segment_bytes(int world);
  // Region of rank's segment for the point-to-point rings, zero when made.
  std::byte* ring_region(int rank) const;
  size_t ring_region_bytes() const { return ring_bytes_; }

  // Throws PeerError if the group is aborted, `peer` (or any peer when -1) died or left, or the deadline passed.
  // Call it between slices of any wait. `what`: e.g. "recv #12 from rank 1".
  void check_alive(int peer, const std::string& what, Deadline deadline) const;
  // Throws Interrupted if this rank was told to stop, and ends the group. Call it beside check_alive, without a lock
  // that a thread may want which keeps the interrupt hook waiting (in Python: one that is taken with the GIL held).
  void check_interrupt(const std::string& what) const;
  // Refuses a call that a signal handler makes, in a thread that waits in a call of this group: it would wait for
  // itself.
  void refuse_in_handler() const;
  bool in_handler() const;
  // "rank 3" as the group counts, for messages.
  std::string rank_text(int place) const;
  // Ends every wait of every rank of the group with `reason`. Sticky.
  void abort(const std::string& reason) const;
  bool aborted() const;
  // Why the group ended; empty if it did not.
  std::string reason() const;
  // This rank will call no more; it has made `calls` calls between hosts. The first word counts.
  void leave(uint64_t calls = 0);
  bool has_left(int rank) const;
  uint64_t left_after(int rank) const { return heads_[static_cast<size_t>(rank)]->left_after; }
  // A rank of another host has left: for check_alive().
  void set_gone(int place) { gone_[static_cast<size_t>(place)] = true; }
  // How long a wait spins before it sleeps: 0 when the ranks of this host outnumber its cores.
  uint64_t spin_ns() const;
  // The calling thread runs beside the main computation: it must not spin.
  static void set_background_thread(bool background);
  uint64_t calls() const { return calls_; }
  // Runs what a queue in front of this communicator still holds, so that a direct call comes after the calls that were
  // issued before it, on every rank alike. `flush` may be null.
  void set_flush(std::function<void()> flush);
  void flush();
  // Of calls that name no timeout of their own.
  Deadline default_deadline() const { return Deadline::after(std::chrono::milliseconds(timeout_ms_.load())); }
  void set_timeout(std::chrono::milliseconds timeout) { timeout_ms_ = timeout.count(); }
  // Does this mesh hold all ranks of the group? Otherwise other hosts take part and this is only one host's share.
  bool whole_group() const { return mesh_->hosts.size() == 1; }
  const Mesh& mesh() const { return *mesh_; }

  // Test seam: called before each publish and each consume with a seeded stall. Null outside tests.
  static void set_stall(void (*stall)(int rank, uint32_t round));

 private:
  // Runs body and, if it throws PeerError, ends the call on every other rank too.
  template <typename Body>
  void guarded(Body&& body) {
    try {
      body();
    } catch (const PeerError& error) {
      abort(error.what());
      throw;
    } catch (const Interrupted&) {
      abort(interrupted_text());
      throw;
    }
  }
  std::string interrupted_text() const;
  struct Call;

  std::unique_ptr<Mesh> mesh_;
  std::vector<ControlHeader*> heads_;
  std::vector<std::byte*> slots_;
  size_t slot_bytes_ = 0;
  size_t chunk_bytes_ = 0;  // of a slot, that a large staged tensor takes at a time
  size_t ring_bytes_ = 0;
  uint64_t spin_ns_ = 0;
  uint64_t calls_ = 0;
  std::atomic<int64_t> timeout_ms_{1'800'000};
  std::vector<uint32_t> seen_;           // the newest round known of each peer
  std::vector<std::atomic<bool>> gone_;  // by place
  std::unique_ptr<Windows> windows_;
  std::mutex mutex_;
  std::mutex flush_mutex_;
  std::function<void()> flush_;
};

}  // namespace pypar
