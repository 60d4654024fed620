// What the rings keep in shared memory and for each peer. Internal to comm/.
#pragma once

#include "comm/rings.h"
#include "pypar/signal.h"

namespace pypar {

inline constexpr uint32_t kRingSlots = 32;  // a power of two: sequence numbers wrap
inline constexpr size_t kInlineMessageBytes = 32;
inline constexpr uint64_t kRingSliceNs = 20'000'000;

struct alignas(kCacheLineBytes) Rings::Slot {
  uint32_t sequence;  // published last; 1, 2, ... over all slots of the ring
  uint32_t bytes;     // of this chunk
  int64_t tag;
  uint64_t total_and_dtype;  // bytes of the message << 8 | DType
  uint64_t window;           // where the message lies in the sender's symmetric memory; 0: in this ring
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
  // Announced, to be copied by the receiver out of a window: done when it has consumed their slots.
  std::deque<std::pair<uint32_t, std::shared_ptr<RingOp>>> announced;
};

}  // namespace pypar
