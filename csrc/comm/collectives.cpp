// The algorithms. Each is a row of rounds (communicator.h); sums run over ranks 0..W-1 and are rounded once.

#include <algorithm>
#include <array>
#include <cstring>
#include <numeric>
#include <vector>

#include "comm/call.h"
#include "cpu/reduce.h"

namespace pypar {

namespace {

// Above this, W > 2 ranks reduce a slice each and exchange the slices, instead of each reducing everything.
constexpr int64_t kOneShotBytes = 64 << 10;

struct Slice {
  int64_t begin, end;
};

// Cache-line aligned cut of `count` items over `world` ranks: no line has two writers.
Slice slice_of(int64_t count, int64_t item, int rank, int world) {
  const int64_t align = std::max<int64_t>(1, kCacheLineBytes / item);
  const int64_t per = ceil_div(ceil_div(count, world), align) * align;
  const int64_t begin = std::min(count, per * rank);
  return {begin, std::min(count, begin + per)};
}

}  // namespace

void Communicator::barrier(Deadline deadline) {
  if (world() == 1) return;
  guarded([&] {
    Call call(*this, Op::barrier, DType::bytes, ReduceOp::none, 0, 0, deadline);
    call.agree(call.next());
  });
}

void Communicator::all_reduce(const void* in, void* out, int64_t count, DType dtype, ReduceOp op, Deadline deadline) {
  check_reduction(dtype, op);
  const auto item = static_cast<int64_t>(item_size(dtype));
  const int64_t bytes = count * item;
  if (world() == 1) return copy_bytes(out, in, static_cast<size_t>(bytes));
  guarded([&] {
    Call call(*this, Op::all_reduce, dtype, op, static_cast<uint64_t>(count), 0, deadline);
    const int me = call.me, world = call.world;
    Sources srcs;
    if (bytes <= static_cast<int64_t>(kInlineBytes)) {  // header and data in one cache line
      std::memcpy(call.header.payload, in, static_cast<size_t>(bytes));
      const uint32_t round = call.next();
      call.agree(round);
      for (int r = 0; r < world; ++r)
        srcs[static_cast<size_t>(r)] = r == me ? call.header.payload : call.line(r, round).payload;
      return reduce_rows(out, srcs.data(), world, count, dtype, op);
    }
    auto in_place = [&](uint64_t window) {  // each rank reduces its slice and writes it to all
      const Slice mine = slice_of(count, item, me, world);
      std::array<void*, kMaxWorld> dsts;
      for (int r = 0; r < world; ++r) {
        srcs[static_cast<size_t>(r)] = call.at(window, r) + mine.begin * item;
        dsts[static_cast<size_t>((r - me + world) % world)] =
            call.at(window, r) + mine.begin * item;  // the own one first
      }
      reduce_rows(dsts.data(), world, srcs.data(), world, mine.end - mine.begin, dtype, op);
    };
    const uint64_t window = in == out ? call.window_of(in, static_cast<size_t>(bytes)) : 0;
    if (world == 2 || bytes <= kOneShotBytes) {
      const int64_t chunk = static_cast<int64_t>(chunk_bytes_) / item;
      auto items = [&](int64_t c) {
        return std::min(chunk, count - c * chunk);
      };
      return call.run(
          ceil_div(count, chunk), window, Call::kAll,
          [&](int64_t c, std::byte* slot) {
            copy_bytes(slot, offset(in, c * chunk * item), static_cast<size_t>(items(c) * item));
          },
          [&](int64_t c, uint32_t round) {
            for (int r = 0; r < world; ++r) {
              srcs[static_cast<size_t>(r)] = r == me ? offset(in, c * chunk * item) : call.slot(r, round);
            }
            reduce_rows(offset(out, c * chunk * item), srcs.data(), world, items(c), dtype, op);
          },
          in_place);
    }
    // Two shots: a slot holds the W slices of a chunk and, behind them, the reduced slice of the chunk before.
    const int64_t per = static_cast<int64_t>(slot_bytes_) / (world + 1) / kCacheLineBytes * kCacheLineBytes / item;
    const int64_t chunk = per * world;
    const int64_t num_chunks = ceil_div(count, chunk);
    auto items = [&](int64_t c) {
      return std::min(chunk, count - c * chunk);
    };
    auto stage_inputs = [&](int64_t c, std::byte* slot) {
      if (c >= num_chunks) return;
      for (int d = 0; d < world; ++d) {
        if (d == me) continue;
        const Slice s = slice_of(items(c), item, d, world);
        copy_bytes(slot + d * per * item, offset(in, (c * chunk + s.begin) * item),
                   static_cast<size_t>((s.end - s.begin) * item));
      }
    };
    auto reduce_slice = [&](int64_t c, uint32_t round, std::byte* result) {
      const Slice s = slice_of(items(c), item, me, world);
      for (int r = 0; r < world; ++r) {
        srcs[static_cast<size_t>(r)] =
            r == me ? offset(in, (c * chunk + s.begin) * item) : call.slot(r, round) + me * per * item;
      }
      reduce_rows(result, srcs.data(), world, s.end - s.begin, dtype, op);
      copy_bytes(offset(out, (c * chunk + s.begin) * item), result, static_cast<size_t>((s.end - s.begin) * item));
    };
    auto take_results = [&](int64_t c, uint32_t round) {
      for (int k = 1; k < world; ++k) {
        const int r = (me + k) % world;
        const Slice s = slice_of(items(c), item, r, world);
        copy_bytes(offset(out, (c * chunk + s.begin) * item), call.slot(r, round) + chunk * item,
                   static_cast<size_t>((s.end - s.begin) * item));
      }
    };
    call.header.window = window;
    call.header.staged = window == 0;
    uint32_t round = call.next();
    if (call.header.staged) stage_inputs(0, call.slot(me, round));
    call.agree(round);
    if (call.all_lines(round, [](const Line& a, const Line& b) { return a.window != 0 && a.window == b.window; })) {
      in_place(window);
      return call.sync();
    }
    if (!call.all_lines(round, [](const Line& a, const Line& b) { return a.staged && b.staged; })) {
      round = call.next();
      stage_inputs(0, call.slot(me, round));
      call.publish(round);
    }
    for (int64_t c = 0; c < num_chunks; ++c, ++round) {
      const uint32_t ahead = call.next();
      stage_inputs(c + 1, call.slot(me, ahead));
      call.wait_all(round);
      if (c > 0) take_results(c - 1, round);
      reduce_slice(c, round, call.slot(me, ahead) + chunk * item);
      call.publish(ahead);
    }
    call.wait_all(round);
    take_results(num_chunks - 1, round);
  });
}

void Communicator::reduce_scatter(const void* const* ins, const int64_t* counts, void* out, DType dtype, ReduceOp op,
                                  Deadline deadline) {
  check_reduction(dtype, op);
  const auto item = static_cast<int64_t>(item_size(dtype));
  if (world() == 1) return copy_bytes(out, ins[0], static_cast<size_t>(counts[0] * item));
  auto reduce = [&](int64_t begin, int64_t num, const void* const* srcs) {
    reduce_rows(offset(out, begin * item), srcs, world(), num, dtype, op);
  };
  reduce_scatter(ins, counts, reduce, dtype, op, deadline);
}

void Communicator::reduce_scatter(const void* const* ins, const int64_t* counts, const ReduceItems& reduce, DType dtype,
                                  ReduceOp op, Deadline deadline) {
  const auto item = static_cast<int64_t>(item_size(dtype));
  const int64_t own = counts[rank()];
  if (world() == 1) return reduce(0, own, ins);
  guarded([&] {
    const int64_t total = std::accumulate(counts, counts + world(), int64_t{0});
    Call call(*this, Op::reduce_scatter, dtype, op, static_cast<uint64_t>(total), hash_sizes(counts, world()),
              deadline);
    const int me = call.me, world = call.world;
    Sources srcs;
    bool contiguous = true;
    int64_t before_me = 0;
    for (int64_t r = 0, at = 0; r < world; at += counts[r], ++r) {
      contiguous = contiguous && (counts[r] == 0 || ins[r] == offset(ins[0], at * item));
      if (r == me) before_me = at;
    }
    if (total * item <= static_cast<int64_t>(kInlineBytes)) {  // everybody's whole input, in the header's line
      auto* payload = reinterpret_cast<std::byte*>(call.header.payload);
      for (int64_t r = 0, at = 0; r < world; at += counts[r], ++r) {
        copy_bytes(payload + at * item, ins[r], static_cast<size_t>(counts[r] * item));
      }
      const uint32_t round = call.next();
      call.agree(round);
      for (int r = 0; r < world; ++r) {
        srcs[static_cast<size_t>(r)] =
            offset(r == me ? call.header.payload : call.line(r, round).payload, before_me * item);
      }
      return reduce(0, own, srcs.data());
    }
    const uint64_t window = contiguous ? call.window_of(ins[0], static_cast<size_t>(total * item)) : 0;
    const int64_t per = static_cast<int64_t>(chunk_bytes_) / (world - 1) / kCacheLineBytes * kCacheLineBytes / item;
    const int64_t largest = *std::max_element(counts, counts + world);
    auto items = [&](int64_t c, int d) {
      return std::clamp<int64_t>(counts[d] - c * per, 0, per);
    };
    auto place = [](int dst, int src) {
      return dst < src ? dst : dst - 1;
    };
    call.run(
        ceil_div(largest, per), window, Call::kAll,
        [&](int64_t c, std::byte* slot) {
          for (int d = 0; d < world; ++d) {
            if (d == me || items(c, d) == 0) continue;
            copy_bytes(slot + place(d, me) * per * item, offset(ins[d], c * per * item),
                       static_cast<size_t>(items(c, d) * item));
          }
        },
        [&](int64_t c, uint32_t round) {
          for (int r = 0; r < world; ++r) {
            srcs[static_cast<size_t>(r)] =
                r == me ? offset(ins[me], c * per * item) : call.slot(r, round) + place(me, r) * per * item;
          }
          reduce(c * per, items(c, me), srcs.data());
        },
        [&](uint64_t agreed) {
          for (int r = 0; r < world; ++r) srcs[static_cast<size_t>(r)] = call.at(agreed, r) + before_me * item;
          reduce(0, own, srcs.data());
        });
  });
}

void Communicator::all_gather(const void* in, const int64_t* bytes, void* const* outs, Deadline deadline, DType dtype) {
  const int64_t own = bytes[rank()];
  if (world() == 1) return copy_bytes(outs[0], in, static_cast<size_t>(own));
  guarded([&] {
    const int64_t total = std::accumulate(bytes, bytes + world(), int64_t{0});
    Call call(*this, Op::all_gather, dtype, ReduceOp::none, static_cast<uint64_t>(total) / item_size(dtype),
              hash_sizes(bytes, world()), deadline);
    const int me = call.me, world = call.world;
    const int64_t largest = *std::max_element(bytes, bytes + world);
    if (largest <= static_cast<int64_t>(kInlineBytes)) {
      copy_bytes(call.header.payload, in, static_cast<size_t>(own));
      const uint32_t round = call.next();
      call.agree(round);
      for (int r = 0; r < world; ++r) {
        copy_bytes(outs[r], r == me ? call.header.payload : call.line(r, round).payload, static_cast<size_t>(bytes[r]));
      }
      return;
    }
    bool contiguous = true;
    int64_t before_me = 0;
    for (int64_t r = 0, at = 0; r < world; at += bytes[r], ++r) {
      contiguous = contiguous && (bytes[r] == 0 || outs[r] == offset(outs[0], at));
      if (r == me) before_me = at;
    }
    const uint64_t window = contiguous ? call.window_of(outs[0], static_cast<size_t>(total)) : 0;
    const auto chunk = static_cast<int64_t>(chunk_bytes_);
    auto part = [&](int64_t c, int r) {
      return static_cast<size_t>(std::clamp<int64_t>(bytes[r] - c * chunk, 0, chunk));
    };
    call.run(
        std::max<int64_t>(1, ceil_div(largest, chunk)), window, Call::kAll,
        [&](int64_t c, std::byte* slot) {
          if (part(c, me) != 0) copy_bytes(slot, offset(in, c * chunk), part(c, me));
        },
        [&](int64_t c, uint32_t round) {
          for (int k = 0; k < world; ++k) {
            const int r = (me + k) % world;
            if (part(c, r) == 0) continue;
            copy_bytes(offset(outs[r], c * chunk), r == me ? offset(in, c * chunk) : call.slot(r, round), part(c, r));
          }
        },
        [&](uint64_t agreed) {
          for (int k = 0; k < world; ++k) {  // push: the shard is read once from memory, then from cache
            copy_bytes(call.at(agreed, (me + k) % world) + before_me, in, static_cast<size_t>(own));
          }
        });
  });
}

void Communicator::all_to_all(const void* const* ins, const int64_t* send_bytes, void* const* outs,
                              const int64_t* recv_bytes, Deadline deadline, DType dtype) {
  if (world() == 1) {
    if (send_bytes[0] != recv_bytes[0]) {
      throw ArgumentError("all_to_all in a world of one sends " + std::to_string(send_bytes[0]) +
                          " bytes to itself but expects " + std::to_string(recv_bytes[0]));
    }
    return copy_bytes(outs[0], ins[0], static_cast<size_t>(send_bytes[0]));
  }
  guarded([&] {
    Call call(*this, Op::all_to_all, dtype, ReduceOp::none, 0, 0, deadline);
    const int me = call.me, world = call.world;
    // Each slot of the first round begins with the sizes this rank sends and expects: every rank checks all pairs.
    const size_t table = 2 * static_cast<size_t>(world) * sizeof(int64_t);
    const int64_t data_at = ceil_div(static_cast<int64_t>(table), kCacheLineBytes) * kCacheLineBytes;
    const int64_t per = (static_cast<int64_t>(slot_bytes_) - data_at) / (world - 1) / kCacheLineBytes * kCacheLineBytes;
    auto place = [](int dst, int src) {
      return dst < src ? dst : dst - 1;
    };
    auto part = [&](int64_t bytes, int64_t c) {
      return static_cast<size_t>(std::clamp<int64_t>(bytes - c * per, 0, per));
    };
    auto stage = [&](int64_t c, std::byte* slot) {
      for (int d = 0; d < world; ++d) {
        if (d == me || part(send_bytes[d], c) == 0) continue;
        copy_bytes(slot + data_at + place(d, me) * per, offset(ins[d], c * per), part(send_bytes[d], c));
      }
    };
    bool contiguous = true;
    int64_t sent_bytes = 0;
    for (int r = 0; r < world; sent_bytes += send_bytes[r], ++r) {
      contiguous = contiguous && (send_bytes[r] == 0 || ins[r] == offset(ins[0], sent_bytes));
    }
    call.header.window = contiguous ? call.window_of(ins[0], static_cast<size_t>(sent_bytes)) : 0;
    call.header.staged = call.header.window == 0;
    uint32_t first = call.next();
    std::byte* own_slot = call.slot(me, first);
    std::memcpy(own_slot, send_bytes, table / 2);
    std::memcpy(own_slot + table / 2, recv_bytes, table / 2);
    if (call.header.staged) stage(0, own_slot);
    call.agree(first);
    const uint32_t tables = first;
    auto size_at = [&](int rank, int column) {
      int64_t size;
      std::memcpy(&size, call.slot(rank, tables) + static_cast<size_t>(column) * sizeof size, sizeof size);
      return size;
    };
    int64_t largest = 0;
    for (int s = 0; s < world; ++s) {
      for (int d = 0; d < world; ++d) {
        const int64_t sent = size_at(s, d), expected = size_at(d, world + s);
        if (sent != expected) {
          const auto item = static_cast<int64_t>(item_size(dtype));
          throw PeerError("the ranks of group '" + name() + "' disagree in all_to_all: " + rank_text(s) + " sends " +
                          std::to_string(sent / item) + " " + name_of(dtype) + " to " + rank_text(d) +
                          ", which expects " + std::to_string(expected / item) +
                          "; make output_split_sizes match input_split_sizes");
        }
        if (s != d) largest = std::max(largest, sent);
      }
    }
    copy_bytes(outs[me], ins[me], static_cast<size_t>(send_bytes[me]));
    if (call.all_lines(first, [](const Line& a, const Line& b) { return a.window != 0 && a.window == b.window; })) {
      for (int k = 1; k < world; ++k) {
        const int s = (me + k) % world;
        int64_t at = 0;
        for (int d = 0; d < me; ++d) at += size_at(s, d);
        copy_bytes(outs[s], call.at(call.header.window, s) + at, static_cast<size_t>(recv_bytes[s]));
      }
      return call.sync();
    }
    if (!call.all_lines(first, [](const Line& a, const Line& b) { return a.staged && b.staged; })) {
      first = call.next();
      stage(0, call.slot(me, first));
      call.publish(first);
    }
    call.pipeline(first, std::max<int64_t>(1, ceil_div(largest, per)), Call::kAll, stage,
                  [&](int64_t c, uint32_t round) {
                    for (int k = 1; k < world; ++k) {
                      const int s = (me + k) % world;
                      if (part(recv_bytes[s], c) == 0) continue;
                      copy_bytes(offset(outs[s], c * per), call.slot(s, round) + data_at + place(me, s) * per,
                                 part(recv_bytes[s], c));
                    }
                  });
  });
}

}  // namespace pypar
