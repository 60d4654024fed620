// The symmetric tensors of a group: where each rank's copy begins here, and which of them a peer still maps.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <vector>

#include "comm/bootstrap.h"

namespace pypar {

// A tensor that every rank holds and every rank maps: where each rank's copy begins here.
struct Window {
  uint32_t id = 0;
  size_t bytes = 0;
  std::vector<std::byte*> bases;
  std::vector<Segment> mapped;  // the peers' memory, mapped here
};

// A place in a window travels as one number, the same on every rank: id << 40 | offset in bytes. 0: an ordinary tensor.
class Windows {
 public:
  // In shared memory, one row of them per rank: what that rank maps.
  struct alignas(64) Entry {
    uint32_t id;    // of the newest window here that the rank has not freed
    uint32_t pins;  // messages on their way that the rank will copy out of a peer's window
  };
  static constexpr uint32_t kEntries = 256;
  static constexpr size_t kTableBytes = kEntries * sizeof(Entry);

  // tables: of every rank, zero when made.
  Windows(int rank, std::vector<Entry*> tables) : rank_(rank), tables_(std::move(tables)) {}

  // Ranks add the same windows in the same order.
  void add(const std::byte* base, const std::shared_ptr<Window>& window);
  // The memory at `base` is about to be freed here: it is no symmetric tensor any more.
  void forget(const std::byte* base);

  // The place of [data, data + bytes), or 0.
  uint64_t find(const void* data, size_t bytes) const;
  std::byte* at(uint64_t place, int rank) const;

  // Keeps the window of `place` mapped at `rank` until that rank calls unpin. False: it has freed it already.
  // pin's count and its look at the id form a Dekker pair with forget's id and its look at the count.
  bool pin(uint64_t place, int rank);
  void unpin(uint64_t place);

 private:
  Entry& entry(int rank, uint64_t place) const;
  void sweep();

  const int rank_;
  const std::vector<Entry*> tables_;
  uint32_t next_id_ = 1;
  mutable std::mutex mutex_;
  std::map<const std::byte*, std::shared_ptr<Window>> by_base_;
  std::map<uint32_t, std::shared_ptr<Window>> by_id_;  // also freed ones that are pinned
};

}  // namespace pypar
