// Collectives with a root. Only who reads a rank's data waits for it; the header of the first round reaches all.

#include <algorithm>
#include <cstring>

#include "comm/call.h"
#include "cpu/reduce.h"

namespace pypar {

namespace {

// Where one rank stages and the others read, a chunk must be ready soon: both sides work at once only on different
// ones.
constexpr int64_t kRootedChunkBytes = 128 << 10;
constexpr int64_t kShortChunkBytes = 64 << 10;  // of a broadcast that ends before its chunks fill the caches
constexpr int64_t kShortBytes = 2 << 20;

}  // namespace

void Communicator::broadcast(void* data, int64_t bytes, int root, Deadline deadline, DType dtype) {
  if (world() == 1) return;
  guarded([&] {
    Call call(*this, Op::broadcast, dtype, ReduceOp::none, static_cast<uint64_t>(bytes) / item_size(dtype),
              static_cast<uint64_t>(root), deadline);
    const int me = call.me;
    if (bytes <= static_cast<int64_t>(kInlineBytes)) {
      if (me == root) std::memcpy(call.header.payload, data, static_cast<size_t>(bytes));
      const uint32_t round = call.next();
      call.agree(round);
      if (me != root) std::memcpy(data, call.line(root, round).payload, static_cast<size_t>(bytes));
      return;
    }
    const int64_t chunk = bytes <= kShortBytes ? kShortChunkBytes : kRootedChunkBytes;
    auto part = [&](int64_t c) {
      return static_cast<size_t>(std::min(chunk, bytes - c * chunk));
    };
    call.run(
        ceil_div(bytes, chunk), call.window_of(data, static_cast<size_t>(bytes)), root,
        [&](int64_t c, std::byte* slot) {
          if (me == root) copy_bytes(slot, offset(data, c * chunk), part(c));
        },
        [&](int64_t c, uint32_t round) {
          if (me != root) copy_bytes(offset(data, c * chunk), call.slot(root, round), part(c));
        },
        [&](uint64_t agreed) {  // the root pushes its part to all while they pull the rest: nobody idles
          const int64_t pushed = bytes / call.world / kCacheLineBytes * kCacheLineBytes;
          if (me != root) {
            copy_bytes(offset(data, pushed), call.at(agreed, root) + pushed, static_cast<size_t>(bytes - pushed));
          }
          for (int r = 0; me == root && r < call.world; ++r) {
            if (r != root) copy_bytes(call.at(agreed, r), data, static_cast<size_t>(pushed));
          }
        });
  });
}

void Communicator::reduce(const void* in, void* out, int64_t count, DType dtype, ReduceOp op, int root,
                          Deadline deadline) {
  check_reduction(dtype, op);
  const auto item = static_cast<int64_t>(item_size(dtype));
  if (world() == 1) return copy_bytes(out, in, static_cast<size_t>(count * item));
  guarded([&] {
    Call call(*this, Op::reduce, dtype, op, static_cast<uint64_t>(count), static_cast<uint64_t>(root), deadline);
    const int me = call.me;
    Sources srcs;
    const int64_t chunk = kRootedChunkBytes / item;
    auto items = [&](int64_t c) {
      return std::min(chunk, count - c * chunk);
    };
    call.run(
        ceil_div(count, chunk), 0, me == root ? Call::kAll : Call::kNobody,
        [&](int64_t c, std::byte* slot) {
          if (me != root) copy_bytes(slot, offset(in, c * chunk * item), static_cast<size_t>(items(c) * item));
        },
        [&](int64_t c, uint32_t round) {
          if (me != root) return;
          for (int r = 0; r < call.world; ++r) {
            srcs[static_cast<size_t>(r)] = r == me ? offset(in, c * chunk * item) : call.slot(r, round);
          }
          reduce_rows(offset(out, c * chunk * item), srcs.data(), call.world, items(c), dtype, op);
        },
        [](uint64_t) {});
  });
}

void Communicator::gather(const void* in, int64_t bytes, void* const* outs, int root, Deadline deadline, DType dtype) {
  if (world() == 1) return copy_bytes(outs[0], in, static_cast<size_t>(bytes));
  guarded([&] {
    Call call(*this, Op::gather, dtype, ReduceOp::none, static_cast<uint64_t>(bytes) / item_size(dtype),
              static_cast<uint64_t>(root), deadline);
    const int me = call.me;
    const int64_t chunk = kRootedChunkBytes;
    auto part = [&](int64_t c) {
      return static_cast<size_t>(std::min(chunk, bytes - c * chunk));
    };
    call.run(
        ceil_div(bytes, chunk), 0, me == root ? Call::kAll : Call::kNobody,
        [&](int64_t c, std::byte* slot) {
          if (me != root) copy_bytes(slot, offset(in, c * chunk), part(c));
        },
        [&](int64_t c, uint32_t round) {
          if (me != root) return;
          for (int r = 0; r < call.world; ++r) {
            copy_bytes(offset(outs[r], c * chunk), r == me ? offset(in, c * chunk) : call.slot(r, round), part(c));
          }
        },
        [](uint64_t) {});
  });
}

void Communicator::scatter(const void* const* ins, int64_t bytes, void* out, int root, Deadline deadline, DType dtype) {
  if (world() == 1) return copy_bytes(out, ins[0], static_cast<size_t>(bytes));
  guarded([&] {
    Call call(*this, Op::scatter, dtype, ReduceOp::none, static_cast<uint64_t>(bytes) / item_size(dtype),
              static_cast<uint64_t>(root), deadline);
    const int me = call.me;
    const int64_t per = std::min(
        kRootedChunkBytes, static_cast<int64_t>(slot_bytes_) / (call.world - 1) / kCacheLineBytes * kCacheLineBytes);
    auto place = [&](int dst) {
      return dst < root ? dst : dst - 1;
    };
    auto part = [&](int64_t c) {
      return static_cast<size_t>(std::min(per, bytes - c * per));
    };
    call.run(
        ceil_div(bytes, per), 0, root,
        [&](int64_t c, std::byte* slot) {
          if (me != root) return;
          for (int d = 0; d < call.world; ++d) {
            if (d != root) copy_bytes(slot + place(d) * per, offset(ins[d], c * per), part(c));
          }
        },
        [&](int64_t c, uint32_t round) {
          copy_bytes(offset(out, c * per),
                     me == root ? offset(ins[me], c * per) : call.slot(root, round) + place(me) * per, part(c));
        },
        [](uint64_t) {});
  });
}

}  // namespace pypar
