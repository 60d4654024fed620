// One call of a collective: its lock, its rounds, its header. Internal to comm/.
#pragma once

#include <array>
#include <atomic>
#include <string>
#include <utility>

#include "comm/communicator.h"
#include "pypar/signal.h"

namespace pypar {

struct Communicator::Call {
  Call(Communicator& communicator, Op op, DType dtype, ReduceOp reduce_op, uint64_t count, uint64_t detail,
       Deadline deadline);

  // The number of the next round to publish; its slot may be written when this returns.
  uint32_t next();
  void publish(uint32_t round);
  void wait(int peer, uint32_t round);
  void wait_all(uint32_t round);
  // A round without data: when it returns, every rank has got this far.
  void sync();

  std::byte* slot(int rank, uint32_t round) const {
    return c.slots_[static_cast<size_t>(rank)] + (round % kSlots) * c.slot_bytes_;
  }
  const Line& line(int rank, uint32_t round) const {
    return c.heads_[static_cast<size_t>(rank)]->lines[round % kSlots];
  }

  // Publishes the header in `round`, does something `meanwhile`, waits for everybody's header and compares them. Throws
  // PeerError, on every rank, when two ranks called different things.
  template <typename Meanwhile>
  void agree(uint32_t round, Meanwhile&& meanwhile) {
    publish_header(round);
    meanwhile();
    compare_headers(round);
  }
  void agree(uint32_t round) {
    agree(round, [] {});
  }
  void publish_header(uint32_t round);
  void compare_headers(uint32_t round);
  // The place of [data, data + bytes) in a window, or 0; and where that place is on another rank.
  uint64_t window_of(const void* data, size_t bytes) const { return c.windows_->find(data, bytes); }
  std::byte* at(uint64_t window, int rank) const { return c.windows_->at(window, rank); }
  bool all_lines(uint32_t round, bool (*holds)(const Line& mine, const Line& theirs)) const;

  // Rounds with data. stage(chunk, slot) writes this rank's part; consume(chunk, round) reads the peers'.
  // Chunk 0 was staged and published in `first`; chunk i+1 is staged before chunk i is waited for. `reads`: from whom
  // this rank reads (a rank, kAll or kNobody); it waits for nobody else, next() keeps it from running ahead.
  static constexpr int kAll = -1, kNobody = -2;
  template <typename Stage, typename Consume>
  void pipeline(uint32_t first, int64_t num_chunks, int reads, Stage&& stage, Consume&& consume) {
    for (int64_t chunk = 0; chunk < num_chunks; ++chunk) {
      if (chunk + 1 < num_chunks) {
        const uint32_t ahead = next();
        stage(chunk + 1, slot(me, ahead));
        publish(ahead);
      }
      const uint32_t round = first + static_cast<uint32_t>(chunk);
      if (reads == kAll) wait_all(round);
      if (reads >= 0 && reads != me) wait(reads, round);
      consume(chunk, round);
    }
  }

  // The whole of a staged call. `windowed`: this rank's data lies in a window, so it staged nothing yet. `in_place(id)`
  // runs when every rank's data lies in the same place of the same window; otherwise all ranks stage. meanwhile() runs
  // when the peers may begin and before this rank waits for them.
  template <typename Stage, typename Consume, typename InPlace, typename Meanwhile>
  void run(int64_t num_chunks, uint64_t window, int reads, Stage&& stage, Consume&& consume, InPlace&& in_place,
           Meanwhile&& meanwhile) {
    header.window = window;
    header.staged = window == 0;
    uint32_t first = next();
    if (header.staged) stage(0, slot(me, first));
    agree(first, meanwhile);
    if (all_lines(first, [](const Line& mine, const Line& theirs) {
          return mine.window != 0 && mine.window == theirs.window;
        })) {
      in_place(window);
      sync();  // nobody may touch the window while a peer still reads or writes it
      return;
    }
    if (!all_lines(first, [](const Line& mine, const Line& theirs) { return mine.staged && theirs.staged; })) {
      first = next();
      stage(0, slot(me, first));
      publish(first);
    }
    pipeline(first, num_chunks, reads, stage, consume);
  }
  template <typename Stage, typename Consume, typename InPlace>
  void run(int64_t num_chunks, uint64_t window, int reads, Stage&& stage, Consume&& consume, InPlace&& in_place) {
    run(num_chunks, window, reads, stage, consume, in_place, [] {});
  }

  std::string describe(int rank, const Line& line) const;
  std::string call_text() const;

  Communicator& c;
  const int me;
  const int world;
  Line header{};
  const Deadline deadline;
  std::unique_lock<std::mutex> lock;
};

using Sources = std::array<const void*, kMaxWorld>;

inline std::byte* offset(void* data, int64_t bytes) {
  return static_cast<std::byte*>(data) + bytes;
}
inline const std::byte* offset(const void* data, int64_t bytes) {
  return static_cast<const std::byte*>(data) + bytes;
}
// What must agree when ranks name uneven parts.
inline uint64_t hash_sizes(const int64_t* sizes, int num) {
  uint64_t hash = 0xcbf29ce484222325ull;
  for (int i = 0; i < num; ++i) hash = (hash ^ static_cast<uint64_t>(sizes[i])) * 0x100000001b3ull;
  return hash;
}
inline int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

}  // namespace pypar
