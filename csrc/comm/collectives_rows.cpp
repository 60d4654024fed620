// Collectives with a matmul at one end: the rows are used where they lie, or made where they are needed.

#include <algorithm>
#include <numeric>
#include <vector>

#include "comm/call.h"
#include "cpu/reduce.h"

namespace pypar {

namespace {

// Up to here, and always on two ranks, every rank sums everything; above, its own rows, which then go to all.
constexpr int64_t kOneShotBytes = 64 << 10;

// Rows of one piece: as many as fit in `bytes`, maybe none.
int64_t rows_within(size_t bytes, int64_t row_bytes) {
  return static_cast<int64_t>(bytes) / std::max<int64_t>(1, row_bytes);
}

// out = the sum of srcs along a binary tree (of two it is the sum in order), then of `more`; out may be one of them.
void sum_tree(std::byte* out, const std::vector<const void*>& srcs, const std::vector<const void*>& more, int64_t count,
              DType dtype) {
  constexpr int64_t kItems = 512;
  const auto item = static_cast<int64_t>(item_size(dtype));
  std::vector<std::byte> sums(srcs.size() / 2 * static_cast<size_t>(kItems * item));
  std::vector<const void*> level, last;
  for (int64_t begin = 0; begin < count; begin += kItems) {
    const int64_t num = std::min(kItems, count - begin);
    level.clear();
    for (const void* src : srcs) level.push_back(offset(src, begin * item));
    for (; level.size() > 1; level.resize(level.size() / 2)) {
      for (size_t i = 0; i < level.size() / 2; ++i) {
        const void* pair[] = {level[2 * i], level[2 * i + 1]};
        std::byte* sum = sums.data() + static_cast<int64_t>(i) * kItems * item;
        reduce_rows(sum, pair, 2, num, dtype, ReduceOp::sum);
        level[i] = sum;
      }
    }
    last = level;
    for (const void* src : more) last.push_back(offset(src, begin * item));
    reduce_rows(out + begin * item, last.data(), static_cast<int>(last.size()), num, dtype, ReduceOp::sum);
  }
}

// out = the sum of srcs and of what `more` appends.
void sum_rows(void* out, std::vector<const void*>& srcs, int64_t begin, int64_t num, int64_t row_items, DType dtype,
              const std::function<void(int64_t, int64_t, std::vector<const void*>&)>& more,
              ReduceOp order = ReduceOp::sum) {
  if (order == ReduceOp::tree && srcs.size() > 2) {
    std::vector<const void*> after;
    if (more) more(begin, num, after);
    return sum_tree(static_cast<std::byte*>(out), srcs, after, num * row_items, dtype);
  }
  if (more) more(begin, num, srcs);
  reduce_rows(out, srcs.data(), static_cast<int>(srcs.size()), num * row_items, dtype, ReduceOp::sum);
}

// Where a row does not fit in a slot, rows travel item by item: what is made of them goes through memory of this rank.
struct Items {
  std::vector<std::byte> memory;
  std::vector<int64_t> counts;  // items of each rank
  std::vector<std::byte*> parts;

  Items(const int64_t* rows, int world, int64_t row_items, int64_t item_bytes) {
    int64_t total = 0;
    for (int r = 0; r < world; ++r) counts.push_back(rows[r] * row_items), total += counts.back();
    memory.resize(static_cast<size_t>(total * item_bytes));
    std::byte* next = memory.data();
    for (int64_t count : counts) parts.push_back(next), next += count * item_bytes;
  }
};

// `more` of all `rows`, as items.
Communicator::MoreRows items_of(const Communicator::MoreRows& more, int64_t rows, int64_t item_bytes) {
  if (!more) return nullptr;
  return [&more, rows, item_bytes](int64_t begin, int64_t, std::vector<const void*>& srcs) {
    const size_t before = srcs.size();
    more(0, rows, srcs);
    for (size_t i = before; i < srcs.size(); ++i) srcs[i] = offset(srcs[i], begin * item_bytes);
  };
}

}  // namespace

void Communicator::all_gather_rows(const void* in, const int64_t* rows, int64_t row_items, const ConsumeRows& consume,
                                   Deadline deadline, DType dtype) {
  const int64_t row_bytes = row_items * static_cast<int64_t>(item_size(dtype));
  auto whole = [&](int r, const void* data) {
    if (rows[r] != 0) consume(r, 0, rows[r], data);
  };
  if (world() == 1) return whole(0, in);
  const int64_t piece = rows_within(slot_bytes_, row_bytes);
  if (piece == 0) {
    const auto item = static_cast<int64_t>(item_size(dtype));
    Items items(rows, world(), row_items, item);
    auto keep = [&](int src, int64_t begin, int64_t num, const void* data) {
      copy_bytes(items.parts[static_cast<size_t>(src)] + begin * item, data, static_cast<size_t>(num * item));
    };
    all_gather_rows(in, items.counts.data(), 1, keep, deadline, dtype);
    for (int k = 0; k < world(); ++k) {
      const int r = (rank() + k) % world();
      whole(r, items.parts[static_cast<size_t>(r)]);
    }
    return;
  }
  guarded([&] {
    const int64_t total = std::accumulate(rows, rows + world(), int64_t{0});
    Call call(*this, Op::all_gather_rows, dtype, ReduceOp::none, static_cast<uint64_t>(total * row_items),
              hash_sizes(rows, world()), deadline);
    const int me = call.me, world = call.world;
    const int64_t largest = *std::max_element(rows, rows + world);
    auto part = [&](int64_t c, int r) {
      return std::clamp<int64_t>(rows[r] - c * piece, 0, piece);
    };
    call.run(
        std::max<int64_t>(1, ceil_div(largest, piece)), call.window_of(in, static_cast<size_t>(rows[me] * row_bytes)),
        Call::kNobody,
        [&](int64_t c, std::byte* slot) {
          if (part(c, me) != 0) {
            copy_bytes(slot, offset(in, c * piece * row_bytes), static_cast<size_t>(part(c, me) * row_bytes));
          }
        },
        [&](int64_t c, uint32_t round) {
          for (int k = 1; k < world; ++k) {
            const int r = (me + k) % world;
            if (part(c, r) == 0) continue;
            call.wait(r, round);
            consume(r, c * piece, part(c, r), call.slot(r, round));
          }
        },
        [&](uint64_t agreed) {
          for (int k = 1; k < world; ++k) whole((me + k) % world, call.at(agreed, (me + k) % world));
        },
        [&] { whole(me, in); });
  });
}

void Communicator::reduce_scatter_rows(const int64_t* rows, int64_t row_items, const ProduceRows& produce, void* out,
                                       const MoreRows& more, Deadline deadline, DType dtype, RowSum how) {
  const auto item = static_cast<int64_t>(item_size(dtype));
  const int64_t row_bytes = row_items * item;
  if (world() == 1) {
    if (rows[0] == 0) return;
    produce(0, 0, rows[0], out);
    std::vector<const void*> srcs{out};
    return sum_rows(out, srcs, 0, rows[0], row_items, dtype, more);
  }
  const int64_t piece = rows_within(slot_bytes_ / static_cast<size_t>(world() - 1), row_bytes);
  if (piece == 0) {
    Items items(rows, world(), row_items, item);
    for (int r = 0; r < world(); ++r) {
      if (rows[r] != 0) produce(r, 0, rows[r], items.parts[static_cast<size_t>(r)]);
    }
    auto take = [&](int dst, int64_t begin, int64_t num, void* data) {
      copy_bytes(data, items.parts[static_cast<size_t>(dst)] + begin * item, static_cast<size_t>(num * item));
    };
    const auto more_items = items_of(more, rows[rank()], item);
    return reduce_scatter_rows(items.counts.data(), 1, take, out, more_items, deadline, dtype, how);
  }
  guarded([&] {
    const int64_t total = std::accumulate(rows, rows + world(), int64_t{0});
    Call call(*this, Op::reduce_scatter_rows, dtype, how.order, static_cast<uint64_t>(total * row_items),
              hash_sizes(rows, world()) ^ how.facts, deadline);
    const int me = call.me, world = call.world;
    const int64_t largest = *std::max_element(rows, rows + world);
    auto part = [&](int64_t c, int r) {
      return std::clamp<int64_t>(rows[r] - c * piece, 0, piece);
    };
    auto place = [&](int dst, int src) {
      return (dst < src ? dst : dst - 1) * piece * row_bytes;
    };
    std::vector<const void*> srcs;
    call.run(
        std::max<int64_t>(1, ceil_div(largest, piece)), 0, Call::kNobody,
        [&](int64_t c, std::byte* slot) {
          for (int k = 1; k < world; ++k) {
            const int d = (me + k) % world;
            if (part(c, d) != 0) produce(d, c * piece, part(c, d), slot + place(d, me));
          }
        },
        [&](int64_t c, uint32_t round) {
          const int64_t num = part(c, me);
          if (num == 0) return;
          std::byte* mine = offset(out, c * piece * row_bytes);
          produce(me, c * piece, num, mine);
          call.wait_all(round);
          srcs.clear();
          for (int r = 0; r < world; ++r) srcs.push_back(r == me ? mine : call.slot(r, round) + place(me, r));
          sum_rows(mine, srcs, c * piece, num, row_items, dtype, more, how.order);
        },
        [](uint64_t) {});
  });
}

void Communicator::all_reduce_rows(int64_t rows, int64_t row_items, const MakeRows& produce, void* out,
                                   const MoreRows& more, Deadline deadline, DType dtype, RowSum how) {
  const auto item = static_cast<int64_t>(item_size(dtype));
  const int64_t row_bytes = row_items * item;
  if (world() > 2 && rows * row_bytes > kOneShotBytes) {
    std::vector<int64_t> counts, bytes;
    std::vector<void*> parts;
    const int64_t per = ceil_div(rows, world());
    for (int64_t r = 0; r < world(); ++r) {
      parts.push_back(offset(out, std::min(rows, r * per) * row_bytes));
      counts.push_back(std::clamp<int64_t>(rows - r * per, 0, per));
      bytes.push_back(counts.back() * row_bytes);
    }
    const int64_t before_me = std::min(rows, rank() * per);
    reduce_scatter_rows(
        counts.data(), row_items,
        [&](int dst, int64_t begin, int64_t num, void* data) { produce(std::min(rows, dst * per) + begin, num, data); },
        parts[static_cast<size_t>(rank())],
        [&](int64_t begin, int64_t num, std::vector<const void*>& srcs) {
          if (more) more(before_me + begin, num, srcs);
        },
        deadline, dtype, how);
    return all_gather(parts[static_cast<size_t>(rank())], bytes.data(), parts.data(), deadline, dtype);
  }
  if (world() == 1) {
    if (rows == 0) return;
    produce(0, rows, out);
    std::vector<const void*> srcs{out};
    return sum_rows(out, srcs, 0, rows, row_items, dtype, more);
  }
  const int64_t piece = rows_within(slot_bytes_, row_bytes);
  if (piece == 0) {
    Items items(&rows, 1, row_items, item);
    if (rows != 0) produce(0, rows, items.memory.data());
    auto take = [&](int64_t begin, int64_t num, void* data) {
      copy_bytes(data, items.memory.data() + begin * item, static_cast<size_t>(num * item));
    };
    return all_reduce_rows(rows * row_items, 1, take, out, items_of(more, rows, item), deadline, dtype, how);
  }
  guarded([&] {
    Call call(*this, Op::all_reduce_rows, dtype, how.order, static_cast<uint64_t>(rows * row_items), how.facts,
              deadline);
    auto part = [&](int64_t c) {
      return std::clamp<int64_t>(rows - c * piece, 0, piece);
    };
    std::vector<const void*> srcs;
    call.run(
        std::max<int64_t>(1, ceil_div(rows, piece)), 0, Call::kAll,
        [&](int64_t c, std::byte* slot) {
          if (part(c) != 0) produce(c * piece, part(c), slot);
        },
        [&](int64_t c, uint32_t round) {
          if (part(c) == 0) return;
          srcs.clear();
          for (int r = 0; r < call.world; ++r) srcs.push_back(call.slot(r, round));
          sum_rows(offset(out, c * piece * row_bytes), srcs, c * piece, part(c), row_items, dtype, more, how.order);
        },
        [](uint64_t) {});
  });
}

}  // namespace pypar
