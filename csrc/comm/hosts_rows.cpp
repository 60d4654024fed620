// Collectives over hosts with a matmul at one end, in chunks: one chunk is on the wire while the next is multiplied.
//
// Every rank of another host has one rank here that carries its rows: the one of the same place, or of place modulo the
// number of ranks here where hosts differ. Gathered rows come to their carrier, which shows them to its host through
// shared memory; rows to be summed are summed over a host by the carrier of their owner, which sends it the sum. So
// each row crosses the network once per host, and all ranks of a host share the wire.

#include <numeric>

#include "comm/hosts_row_call.h"

namespace pypar {

namespace {

// Up to here one rank of each host talks for all, and to all other hosts: one message instead of two.
constexpr int64_t kFewBytes = 32 << 10;

int64_t at_rank(const std::vector<int64_t>& rows, int r) {
  return rows[static_cast<size_t>(r)];
}

uint64_t hash_of(const std::vector<int64_t>& rows) {
  return hash_sizes(rows.data(), static_cast<int>(rows.size()));
}

int64_t total_of(const std::vector<int64_t>& rows) {
  return std::accumulate(rows.begin(), rows.end(), int64_t{0});
}

at::Tensor bytes_at(const void* data, int64_t bytes) {
  return at::from_blob(const_cast<void*>(data), {bytes}, at::kByte);
}

}  // namespace

void Hosts::all_gather_rows(const void* in, const std::vector<int64_t>& rows, int64_t row_items, int num_chunks,
                            const Communicator::ConsumeRows& consume, Deadline deadline, DType dtype) {
  RowCall call(*this, Op::all_gather_rows, num_chunks, total_of(rows), row_items, hash_of(rows), dtype, deadline);
  const Cut cut{num_chunks};
  std::vector<std::byte*> begins;  // of the chunks in what this rank carries, rank by rank
  std::vector<RowCall::Tickets> comes(static_cast<size_t>(num_chunks));
  int64_t carried = 0;
  for (int r : call.my_carried()) carried += at_rank(rows, r);
  std::byte* to = call.rows_buffer(carried);
  for (int64_t c = 0; c < num_chunks; ++c) {
    begins.push_back(to);
    for (int r : call.my_carried()) {
      const int64_t num = cut.size(at_rank(rows, r), c);
      call.receive_rows(comes[static_cast<size_t>(c)], to, num, r, kRowsTag);
      to += num * call.row_bytes;
    }
  }
  const int64_t own = at_rank(rows, rank_);
  for (int64_t c = 0; c < num_chunks; ++c) {
    for (int r : call.carriers) {
      call.send_rows(offset(in, cut.begin(own, c) * call.row_bytes), cut.size(own, c), r, kRowsTag);
    }
  }
  auto near = [&] {
    std::vector<int64_t> counts;
    for (int r : call.mates) counts.push_back(at_rank(rows, r));
    local_.all_gather_rows(
        in, counts.data(), row_items,
        [&](int src, int64_t begin, int64_t num, const void* data) {
          call.progress();
          consume(call.mates[static_cast<size_t>(src)], begin, num, data);
        },
        deadline, dtype);
  };
  if (num_chunks == 1) call.wait(comes[0]), call.wait(call.sends);
  near();
  for (int64_t c = 0; c < num_chunks; ++c) {
    call.wait(comes[static_cast<size_t>(c)]);
    auto size = [&](int r) {
      return cut.size(at_rank(rows, r), c);
    };
    const auto counts = call.carried_rows(size);
    if (total_of(counts) == 0) continue;
    local_.all_gather_rows(
        begins[static_cast<size_t>(c)], counts.data(), row_items,
        [&](int src, int64_t begin, int64_t num, const void* data) {
          for_ranks(call.carried[static_cast<size_t>(src)], size, begin, num,
                    [&](int r, int64_t row, int64_t n, int64_t at) {
                      call.progress();
                      consume(r, cut.begin(at_rank(rows, r), c) + row, n, offset(data, at * call.row_bytes));
                    });
        },
        deadline, dtype);
  }
  call.wait(call.sends);
}

void Hosts::reduce_scatter_rows(const std::vector<int64_t>& rows, int64_t row_items, int num_chunks,
                                const Communicator::ProduceRows& produce, void* out, const Communicator::MoreRows& more,
                                Deadline deadline, DType dtype) {
  RowCall call(*this, Op::reduce_scatter_rows, num_chunks, total_of(rows), row_items, hash_of(rows), dtype, deadline);
  const Cut cut{num_chunks};
  const int64_t own = at_rank(rows, rank_), row_bytes = call.row_bytes;
  std::vector<std::byte*> sums;  // of this rank's rows, by the other hosts
  std::vector<RowCall::Tickets> comes(static_cast<size_t>(num_chunks));
  for (int r : call.carriers) {
    sums.push_back(call.rows_buffer(own));
    for (int64_t c = 0; c < num_chunks; ++c) {
      call.receive_rows(comes[static_cast<size_t>(c)], sums.back() + cut.begin(own, c) * row_bytes, cut.size(own, c), r,
                        kRowsTag);
    }
  }
  auto send = [&](int64_t c, const std::byte* from) {
    for (int r : call.my_carried()) {
      const int64_t num = cut.size(at_rank(rows, r), c);
      call.send_rows(from, num, r, kRowsTag);
      from += num * row_bytes;
    }
  };
  const std::byte* whole = nullptr;
  for (int64_t c = 0; c < num_chunks; ++c) {
    auto size = [&](int r) {
      return cut.size(at_rank(rows, r), c);
    };
    const auto counts = call.carried_rows(size);
    std::byte* part = call.rows_buffer(counts[static_cast<size_t>(call.me)]);
    call.sum_locally(
        counts,
        [&](int dst, int64_t begin, int64_t num, void* data) {
          for_ranks(call.carried[static_cast<size_t>(dst)], size, begin, num,
                    [&](int r, int64_t row, int64_t n, int64_t at) {
                      call.progress();
                      produce(r, cut.begin(at_rank(rows, r), c) + row, n, offset(data, at * row_bytes));
                    });
        },
        part);
    if (num_chunks > 1) {
      send(c, part);
    } else {
      whole = part;
    }
  }
  std::vector<int64_t> counts;
  for (int r : call.mates) counts.push_back(at_rank(rows, r));
  call.sum_locally(
      counts,
      [&](int dst, int64_t begin, int64_t num, void* data) {
        call.progress();
        produce(call.mates[static_cast<size_t>(dst)], begin, num, data);
      },
      out);
  if (num_chunks == 1) send(0, whole);
  for (int64_t c = 0; c < num_chunks; ++c) {
    call.wait(comes[static_cast<size_t>(c)]);
    const int64_t begin = cut.begin(own, c);
    std::vector<std::byte*> parts;
    for (std::byte* sum : sums) parts.push_back(sum + begin * row_bytes);
    call.sum_over_hosts(offset(out, begin * row_bytes), begin, cut.size(own, c), parts, more);
  }
  call.wait(call.sends);
}

// Every rank sums a part of each chunk, which then goes to all. Chunk c is made while the shares of chunk c - 1 and the
// sums of chunk c - 2 are on their way.
void Hosts::all_reduce_rows(int64_t rows, int64_t row_items, int num_chunks, const Communicator::MakeRows& produce,
                            void* out, const Communicator::MoreRows& more, Deadline deadline, DType dtype) {
  RowCall call(*this, Op::all_reduce_rows, num_chunks, rows, row_items, 0, dtype, deadline);
  const int64_t row_bytes = call.row_bytes;
  if (num_chunks == 1 && rows * row_bytes <= kFewBytes) {
    if (rows != 0) produce(0, rows, out);
    return all_reduce_few_rows(rows, row_items, out, more, deadline, dtype);
  }
  const Cut cut{num_chunks}, owners{size_};
  const bool alone = local_.world() == 1;  // on this host
  auto begin_of = [&](int64_t c, int r) {
    return cut.begin(rows, c) + owners.begin(cut.size(rows, c), r);
  };
  auto size_of = [&](int64_t c, int r) {
    return owners.size(cut.size(rows, c), r);
  };
  auto row = [&](int64_t index) {
    return offset(out, index * row_bytes);
  };
  struct Chunk {
    std::vector<std::byte*> sums;  // of this rank's rows, by the other hosts
    RowCall::Tickets sums_come, rows_come;
    std::byte* part = nullptr;   // this host's sums of what this rank carries
    std::byte* shown = nullptr;  // this rank's rows and those that it carries, for its host
  };
  std::vector<Chunk> chunks(static_cast<size_t>(num_chunks));
  auto carried_at = [&](int64_t c) {
    return call.carried_rows([&](int r) { return size_of(c, r); });
  };
  for (int64_t c = 0; c < num_chunks; ++c) {
    Chunk& chunk = chunks[static_cast<size_t>(c)];
    const int64_t own = size_of(c, rank_);
    for (int r : call.carriers) {
      chunk.sums.push_back(call.rows_buffer(own));
      call.receive_rows(chunk.sums_come, chunk.sums.back(), own, r, kSumsTag);
    }
    if (!alone) chunk.shown = call.rows_buffer(own + carried_at(c)[static_cast<size_t>(call.me)]);
    int64_t at = own;
    for (int r : call.my_carried()) {
      std::byte* to = alone ? row(begin_of(c, r)) : chunk.shown + at * row_bytes;
      call.receive_rows(chunk.rows_come, to, size_of(c, r), r, kRowsTag);
      at += size_of(c, r);
    }
  }
  auto send_part = [&](int64_t c) {
    const std::byte* from = chunks[static_cast<size_t>(c)].part;
    for (int r : call.my_carried()) {
      call.send_rows(from, size_of(c, r), r, kSumsTag);
      from += size_of(c, r) * row_bytes;
    }
  };
  auto make = [&](int64_t c) {
    const auto counts = carried_at(c);
    Chunk& chunk = chunks[static_cast<size_t>(c)];
    chunk.part = call.rows_buffer(counts[static_cast<size_t>(call.me)]);
    call.sum_locally(
        counts,
        [&](int dst, int64_t begin, int64_t num, void* data) {
          for_ranks(
              call.carried[static_cast<size_t>(dst)], [&](int r) { return size_of(c, r); }, begin, num,
              [&](int r, int64_t first, int64_t n, int64_t at) {
                call.progress();
                produce(begin_of(c, r) + first, n, offset(data, at * row_bytes));
              });
        },
        chunk.part);
    if (num_chunks > 1) send_part(c);
    std::vector<int64_t> near;
    for (int r : call.mates) near.push_back(size_of(c, r));
    call.sum_locally(
        near,
        [&](int dst, int64_t begin, int64_t num, void* data) {
          call.progress();
          produce(begin_of(c, call.mates[static_cast<size_t>(dst)]) + begin, num, data);
        },
        row(begin_of(c, rank_)));
    if (num_chunks == 1) send_part(c);
  };
  auto sum = [&](int64_t c) {
    Chunk& chunk = chunks[static_cast<size_t>(c)];
    const int64_t begin = begin_of(c, rank_), own = size_of(c, rank_);
    call.wait(chunk.sums_come);
    call.sum_over_hosts(row(begin), begin, own, chunk.sums, more);
    for (int r : call.carriers) call.send_rows(row(begin), own, r, kRowsTag);
    if (!alone) copy_bytes(chunk.shown, row(begin), static_cast<size_t>(own * row_bytes));
  };
  auto take = [&](int64_t c) {
    Chunk& chunk = chunks[static_cast<size_t>(c)];
    call.wait(chunk.rows_come);
    auto counts = carried_at(c);
    for (size_t place = 0; place < counts.size(); ++place) counts[place] += size_of(c, call.mates[place]);
    if (alone || total_of(counts) == 0) return;
    local_.all_gather_rows(
        chunk.shown, counts.data(), row_items,
        [&](int src, int64_t begin, int64_t num, const void* data) {
          std::vector<int> ranks{call.mates[static_cast<size_t>(src)]};
          ranks.insert(ranks.end(), call.carried[static_cast<size_t>(src)].begin(),
                       call.carried[static_cast<size_t>(src)].end());
          for_ranks(
              ranks, [&](int r) { return size_of(c, r); }, begin, num,
              [&](int r, int64_t first, int64_t n, int64_t at) {
                copy_bytes(row(begin_of(c, r) + first), offset(data, at * row_bytes),
                           static_cast<size_t>(n * row_bytes));
              });
        },
        deadline, dtype);
  };
  for (int64_t c = 0; c < num_chunks + 2; ++c) {
    if (c < num_chunks) make(c);
    if (c >= 1 && c - 1 < num_chunks) sum(c - 1);
    if (c >= 2) take(c - 2);
  }
  call.wait(call.sends);
}

// `out`: this rank's shares, which become the sums.
void Hosts::all_reduce_few_rows(int64_t rows, int64_t row_items, void* out, const Communicator::MoreRows& more,
                                Deadline deadline, DType dtype) {
  if (rows == 0) return;
  const int64_t bytes = rows * row_items * static_cast<int64_t>(item_size(dtype));
  if (local_.world() > 1) {
    local_.reduce(out, leads() ? out : nullptr, rows * row_items, dtype, ReduceOp::sum, 0, deadline);
  }
  if (leads()) {
    at::Tensor own = bytes_at(out, bytes), all = at::empty({static_cast<int64_t>(hosts_.size()) * bytes}, at::kByte);
    finish(name_of(Op::all_reduce_rows), deadline, [&] {
      c10d::AllgatherOptions options;
      options.timeout = time_left(deadline);
      return inner_.across->_allgather_base(all, own, options);
    });
    std::vector<const void*> srcs;
    for (size_t h = 0; h < hosts_.size(); ++h) srcs.push_back(offset(all.data_ptr(), static_cast<int64_t>(h) * bytes));
    if (more) more(0, rows, srcs);
    reduce_rows(out, srcs.data(), static_cast<int>(srcs.size()), rows * row_items, dtype, ReduceOp::sum);
  }
  if (local_.world() > 1) local_.broadcast(out, bytes, 0, deadline);
}

}  // namespace pypar
