// One call of hosts_rows.cpp: who sends to whom, what all ranks agree on, what is on its way. Internal to comm/.
#pragma once

#include <algorithm>
#include <cstring>
#include <string>
#include <vector>

#include <ATen/ATen.h>

#include "comm/call.h"
#include "comm/hosts.h"
#include "cpu/reduce.h"

namespace pypar {

// Tags of gloo that nothing else has; see hosts.cpp and messages.cpp.
inline constexpr int kAgreeTag = (1 << 28) + 2;
inline constexpr int kRowsTag = (1 << 28) + 3;
inline constexpr int kSumsTag = (1 << 28) + 4;
// A cut of rows in parts as even as can be; of many rows in multiples of 16, which suit a matmul.
struct Cut {
  int64_t parts;
  int64_t begin(int64_t rows, int64_t part) const {
    const int64_t at = rows * part / parts;
    return part < parts && rows >= 16 * parts ? at / 16 * 16 : at;
  }
  int64_t size(int64_t rows, int64_t part) const { return begin(rows, part + 1) - begin(rows, part); }
};

// Of rows that lie rank by rank: use(rank, its row, how many, where they begin in [begin, begin + num)).
template <typename Size, typename Use>
void for_ranks(const std::vector<int>& ranks, Size&& size, int64_t begin, int64_t num, Use&& use) {
  int64_t at = 0;
  for (int r : ranks) {
    const int64_t n = size(r), from = std::max(begin, at), to = std::min(begin + num, at + n);
    if (from < to) use(r, from - at, to - from, from - begin);
    at += n;
  }
}

// What every rank says before rows travel: gloo ends the process that gets more than it expects.
struct Said {
  int64_t num_chunks, total, row_items;
  uint64_t rows_hash;
  uint32_t op, dtype;
};

inline std::string text_of(const Said& said) {
  return std::string(name_of(static_cast<Op>(said.op))) + "(" + name_of(static_cast<DType>(said.dtype)) + "[" +
         std::to_string(said.total) + ", " + std::to_string(said.row_items) + "] in " +
         std::to_string(said.num_chunks) + " chunks)";
}

inline at::Tensor bytes_at(const void* data, int64_t bytes) {
  return at::from_blob(const_cast<void*>(data), {bytes}, at::kByte);
}

// One call.
struct Hosts::RowCall {
  RowCall(Hosts& all, Op op, int num_chunks, int64_t total, int64_t row_items, uint64_t rows_hash, DType dtype,
          Deadline deadline)
      : hosts(all),
        local(all.local_),
        me(local.rank()),
        num_chunks(num_chunks),
        row_items(row_items),
        row_bytes(row_items * static_cast<int64_t>(item_size(dtype))),
        dtype(dtype),
        deadline(deadline),
        what(name_of(op)),
        mates(hosts.hosts_[static_cast<size_t>(hosts.host_)]),
        carried(mates.size()) {
    if (num_chunks < 1) throw ArgumentError(std::string(what) + ": num_chunks is " + std::to_string(num_chunks));
    ++hosts.calls_;
    for (size_t h = 0; h < hosts.hosts_.size(); ++h) {
      const auto& ranks = hosts.hosts_[h];
      if (static_cast<int>(h) == hosts.host_) continue;
      carriers.push_back(ranks[static_cast<size_t>(me) % ranks.size()]);
      for (size_t place = 0; place < ranks.size(); ++place) carried[place % mates.size()].push_back(ranks[place]);
    }
    agree({num_chunks, total, row_items, rows_hash, static_cast<uint32_t>(op), static_cast<uint32_t>(dtype)});
  }

  const std::vector<int>& my_carried() const { return carried[static_cast<size_t>(me)]; }

  void agree(const Said& mine) {
    std::vector<int> peers = carriers;
    for (int r : my_carried()) {
      if (std::find(peers.begin(), peers.end(), r) == peers.end()) peers.push_back(r);
    }
    auto* theirs = reinterpret_cast<Said*>(buffer(static_cast<int64_t>(sizeof(Said) * (peers.size() + 1))));
    theirs[peers.size()] = mine;
    std::vector<WorkPtr> comes;
    for (size_t i = 0; i < peers.size(); ++i) {
      comes.push_back(receive(&theirs[i], sizeof(Said), peers[i], kAgreeTag));
      send_bytes(&theirs[peers.size()], sizeof(Said), peers[i], kAgreeTag);
    }
    wait(comes);
    for (size_t i = 0; i < peers.size(); ++i) {
      if (std::memcmp(&theirs[i], &mine, sizeof mine) == 0) continue;
      const std::string why = "the ranks of group '" + local.name() + "' disagree: rank " + std::to_string(peers[i]) +
                              " called " + text_of(theirs[i]) + ", rank " + std::to_string(hosts.rank_) + " called " +
                              text_of(mine) + "; every rank must make the same calls, with sizes that match";
      local.abort(why);
      hosts.watch_->wake();
      throw PeerError(why);
    }
  }

  std::byte* buffer(int64_t bytes) {
    buffers.push_back(at::empty({bytes}, at::kByte));
    return static_cast<std::byte*>(buffers.back().data_ptr());
  }
  std::byte* rows_buffer(int64_t rows) { return buffer(rows * row_bytes); }

  WorkPtr receive(void* data, int64_t bytes, int rank, int tag) {
    WorkPtr work;
    hosts.await(what, deadline, [&] {
      std::vector<at::Tensor> tensors{bytes_at(data, bytes)};
      work = hosts.inner_.whole->recv(tensors, rank, tag);
    });
    return work;
  }
  void send_bytes(const void* data, int64_t bytes, int rank, int tag) {
    hosts.await(what, deadline, [&] {
      std::vector<at::Tensor> tensors{bytes_at(data, bytes)};
      sends.push_back(hosts.inner_.whole->send(tensors, rank, tag));
    });
  }
  void receive_rows(std::vector<WorkPtr>& works, void* data, int64_t rows, int rank, int tag) {
    if (rows != 0) works.push_back(receive(data, rows * row_bytes, rank, tag));
  }
  void send_rows(const void* data, int64_t rows, int rank, int tag) {
    if (rows != 0) send_bytes(data, rows * row_bytes, rank, tag);
  }
  void wait(std::vector<WorkPtr>& works) {
    for (auto& work : works) {
      const auto left = time_left(deadline);
      hosts.await(what, deadline, [&] { work->wait(left == c10d::kUnsetTimeout ? kNoTimeout : left); });
    }
    works.clear();
  }

  // out = this host's sum of counts[me] rows. produce(place, begin, num, data).
  void sum_locally(const std::vector<int64_t>& counts, const Communicator::ProduceRows& produce, void* out) {
    if (std::all_of(counts.begin(), counts.end(), [](int64_t n) { return n == 0; })) return;
    if (local.world() == 1) return produce(0, 0, counts[0], out);
    local.reduce_scatter_rows(counts.data(), row_items, produce, out, nullptr, deadline, dtype);
  }
  // out, this host's sum of `num` rows, becomes that of all hosts, of which sums[k] has that of host k of the others.
  void sum_over_hosts(std::byte* out, int64_t begin, int64_t num, const std::vector<std::byte*>& sums,
                      const Communicator::MoreRows& more) {
    if (num == 0) return;
    std::vector<const void*> srcs;
    for (const std::byte* sum : sums) srcs.push_back(sum);
    srcs.insert(srcs.begin() + hosts.host_, out);
    if (more) more(begin, num, srcs);
    reduce_rows(out, srcs.data(), static_cast<int>(srcs.size()), num * row_items, dtype, ReduceOp::sum);
  }
  // By place on this host: the sum of size(r) over the ranks that it carries.
  template <typename Size>
  std::vector<int64_t> carried_rows(Size&& size) const {
    std::vector<int64_t> counts;
    for (const auto& ranks : carried) {
      counts.push_back(0);
      for (int r : ranks) counts.back() += size(r);
    }
    return counts;
  }

  Hosts& hosts;
  Communicator& local;
  const int me, num_chunks;
  const int64_t row_items, row_bytes;
  const DType dtype;
  const Deadline deadline;
  const char* const what;
  const std::vector<int>& mates;          // the ranks of this host
  std::vector<int> carriers;              // of this rank's rows on the other hosts, in the order of hosts
  std::vector<std::vector<int>> carried;  // by place on this host: of which ranks
  std::vector<at::Tensor> buffers;        // outlive what is on its way to and from them
  std::vector<WorkPtr> sends;
};

}  // namespace pypar
