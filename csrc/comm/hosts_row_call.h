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

inline constexpr uint32_t kAgreeTag = 1, kRowsTag = 2, kSumsTag = 3;

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

// What every rank says before rows travel, so that calls that don't match are told from each other by name.
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

// One call.
struct Hosts::RowCall {
  using Tickets = std::vector<Links::Ticket>;
  // The memory of what is on its way goes with a call that fails: so do the connections.
  struct OwnLinks {
    Links* links = nullptr;
    ~OwnLinks() {
      if (links != nullptr) links->drop();
    }
    Links* operator->() const { return links; }
  };

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
        check(hosts.link_check(what, deadline)),
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
    peers = carriers;
    for (int r : my_carried()) {
      if (std::find(peers.begin(), peers.end(), r) == peers.end()) peers.push_back(r);
    }
    hosts.await(what, deadline, [&] { links.links = &hosts.links(peers, check); });
    agree({num_chunks, total, row_items, rows_hash, static_cast<uint32_t>(op), static_cast<uint32_t>(dtype)});
  }

  const std::vector<int>& my_carried() const { return carried[static_cast<size_t>(me)]; }

  void agree(const Said& mine) {
    auto* theirs = reinterpret_cast<Said*>(buffer(static_cast<int64_t>(sizeof(Said) * (peers.size() + 1))));
    theirs[peers.size()] = mine;
    Tickets comes;
    for (size_t i = 0; i < peers.size(); ++i) {
      comes.push_back(links->receive(peers[i], &theirs[i], sizeof(Said), kAgreeTag));
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

  void send_bytes(const void* data, int64_t bytes, int rank, uint32_t tag) {
    hosts.await(what, deadline, [&] { sends.push_back(links->send(rank, data, bytes, tag)); });
  }
  void receive_rows(Tickets& comes, void* data, int64_t rows, int rank, uint32_t tag) {
    if (rows != 0) comes.push_back(links->receive(rank, data, rows * row_bytes, tag));
  }
  void send_rows(const void* data, int64_t rows, int rank, uint32_t tag) {
    if (rows != 0) send_bytes(data, rows * row_bytes, rank, tag);
  }
  // Between two matmuls: what can be moved at once is.
  void progress() {
    hosts.await(what, deadline, [&] { links->progress(); });
  }
  void wait(Tickets& messages) {
    hosts.await(what, deadline, [&] {
      for (const auto& message : messages) links->wait(message, check);
    });
    messages.clear();
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
  const Links::Check check;
  const std::vector<int>& mates;          // the ranks of this host
  std::vector<int> carriers;              // of this rank's rows on the other hosts, in the order of hosts
  std::vector<int> peers;                 // carriers of its rows, and ranks whose rows it carries
  std::vector<std::vector<int>> carried;  // by place on this host: of which ranks
  std::vector<at::Tensor> buffers;        // outlive what is on its way to and from them
  Tickets sends;
  OwnLinks links;
};

}  // namespace pypar
