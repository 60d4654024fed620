// Collectives over hosts whose parts differ in size, or whose numbers of ranks do: what leaves a host is gathered at
// its leader, the leaders swap what their hosts have for each other, and each leader hands out what came. So every byte
// crosses the network once per host.

#include <algorithm>
#include <numeric>

#include <ATen/ATen.h>

#include "comm/hosts.h"
#include "comm/tensors.h"
#include "cpu/reduce.h"

namespace pypar {

namespace {

int64_t sum_of(const std::vector<int64_t>& numbers) {
  return std::accumulate(numbers.begin(), numbers.end(), int64_t{0});
}

at::Tensor buffer(int64_t bytes) {
  return at::empty({bytes}, at::kByte);
}

std::byte* begin_of(const at::Tensor& tensor) {
  return static_cast<std::byte*>(tensor.data_ptr());
}

// Appends to what `at` points to.
void append(std::byte*& at, const void* data, int64_t bytes) {
  copy_bytes(at, data, static_cast<size_t>(bytes));
  at += bytes;
}

}  // namespace

void Hosts::swap_across(at::Tensor& output, std::vector<int64_t> output_splits, at::Tensor& input,
                        std::vector<int64_t> input_splits, Deadline deadline) {
  finish("all_to_all", deadline, [&] {
    c10d::AllToAllOptions options;
    options.timeout = time_left(deadline);
    return inner_.across->alltoall_base(output, input, output_splits, input_splits, options);
  });
}

// bytes[r] from each rank of the host, one behind the other; `out` on the leader only.
void Hosts::to_leader(const void* in, void* out, const std::vector<int64_t>& bytes, Deadline deadline) {
  const auto local = static_cast<size_t>(local_.world());
  std::vector<int64_t> send(local, 0), recv(local, 0);
  std::vector<const void*> ins(local, in);
  std::vector<void*> outs(local, out);
  send[0] = bytes[static_cast<size_t>(local_.rank())];
  if (leads()) recv = bytes;
  for (size_t r = 1; r < local; ++r) outs[r] = static_cast<std::byte*>(outs[r - 1]) + recv[r - 1];
  local_.all_to_all(ins.data(), send.data(), outs.data(), recv.data(), deadline);
}

// The other way round.
void Hosts::from_leader(const void* in, void* out, const std::vector<int64_t>& bytes, Deadline deadline) {
  const auto local = static_cast<size_t>(local_.world());
  std::vector<int64_t> send(local, 0), recv(local, 0);
  std::vector<const void*> ins(local, in);
  std::vector<void*> outs(local, out);
  recv[0] = bytes[static_cast<size_t>(local_.rank())];
  if (leads()) send = bytes;
  for (size_t r = 1; r < local; ++r) ins[r] = static_cast<const std::byte*>(ins[r - 1]) + send[r - 1];
  local_.all_to_all(ins.data(), send.data(), outs.data(), recv.data(), deadline);
}

void Hosts::all_gather(const void* in, const std::vector<int64_t>& bytes, void* const* outs, Deadline deadline) {
  at::NoGradGuard no_grad;
  const at::Tensor whole = buffer(sum_of(bytes));
  if (equal_ && std::all_of(bytes.begin(), bytes.end(), [&](int64_t n) { return n == bytes[0]; })) {
    at::Tensor rows = whole;
    all_gather(rows, at::from_blob(const_cast<void*>(in), {bytes[0]}, at::kByte), deadline);
    for (int r = 0; r < size_; ++r) copy_bytes(outs[r], begin_of(whole) + r * bytes[0], static_cast<size_t>(bytes[0]));
    return;
  }
  ++calls_;  // and below, the whole is host by host
  std::vector<at::Tensor> blocks;
  std::vector<void*> own;
  std::vector<int64_t> own_bytes;
  int64_t begin = 0;
  for (size_t h = 0; h < hosts_.size(); ++h) {
    int64_t end = begin;
    for (int r : hosts_[h]) {
      if (static_cast<int>(h) == host_) {
        own.push_back(begin_of(whole) + end);
        own_bytes.push_back(bytes[static_cast<size_t>(r)]);
      }
      end += bytes[static_cast<size_t>(r)];
    }
    blocks.push_back(whole.narrow(0, begin, end - begin));
    begin = end;
  }
  local_.all_gather(in, own_bytes.data(), own.data(), deadline);
  for (size_t h = 0; h < hosts_.size(); ++h) {
    if (blocks[h].numel() == 0) continue;
    if (leads()) {
      finish("all_gather", deadline, [&] {
        std::vector<at::Tensor> block{blocks[h]};
        c10d::BroadcastOptions options;
        options.rootRank = static_cast<int64_t>(h);
        options.timeout = time_left(deadline);
        return inner_.across->broadcast(block, options);
      });
    }
    if (static_cast<int>(h) != host_) local_.broadcast(blocks[h].data_ptr(), blocks[h].numel(), 0, deadline);
  }
  const std::byte* at = begin_of(whole);
  for (const auto& host : hosts_) {
    for (int r : host) {
      copy_bytes(outs[r], at, static_cast<size_t>(bytes[static_cast<size_t>(r)]));
      at += bytes[static_cast<size_t>(r)];
    }
  }
}

void Hosts::all_to_all(const void* const* ins, const std::vector<int64_t>& send_bytes, void* const* outs,
                       const std::vector<int64_t>& recv_bytes, Deadline deadline) {
  at::NoGradGuard no_grad;
  ++calls_;
  const auto& mine = hosts_[static_cast<size_t>(host_)];
  const auto local = static_cast<int64_t>(mine.size());
  // What stays on the host.
  {
    std::vector<const void*> near_ins;
    std::vector<void*> near_outs;
    std::vector<int64_t> near_send, near_recv;
    for (int r : mine) {
      near_ins.push_back(ins[r]);
      near_outs.push_back(outs[r]);
      near_send.push_back(send_bytes[static_cast<size_t>(r)]);
      near_recv.push_back(recv_bytes[static_cast<size_t>(r)]);
    }
    local_.all_to_all(near_ins.data(), near_send.data(), near_outs.data(), near_recv.data(), deadline);
  }
  // The sizes of all ranks of the host: [rank][send or recv][peer].
  std::vector<int64_t> own = send_bytes;
  own.insert(own.end(), recv_bytes.begin(), recv_bytes.end());
  std::vector<int64_t> sizes(own.size() * mine.size());
  {
    const std::vector<int64_t> bytes(mine.size(), static_cast<int64_t>(own.size() * sizeof own[0]));
    std::vector<void*> rows;
    for (int64_t l = 0; l < local; ++l) rows.push_back(&sizes[static_cast<size_t>(l) * own.size()]);
    local_.all_gather(own.data(), bytes.data(), rows.data(), deadline);
  }
  enum Way { kSend, kRecv };
  auto size_of = [&](int64_t l, Way way, int peer) {
    return sizes[static_cast<size_t>((2 * l + way) * size_ + peer)];
  };
  auto block_of = [&](int64_t l, Way way, size_t host) {  // between a rank of this host and all ranks of another
    int64_t bytes = 0;
    for (int peer : hosts_[host]) bytes += size_of(l, way, peer);
    return bytes;
  };
  std::vector<size_t> others;
  for (size_t h = 0; h < hosts_.size(); ++h) {
    if (static_cast<int>(h) != host_) others.push_back(h);
  }
  std::vector<int64_t> leaves(mine.size(), 0), comes(mine.size(), 0);  // by local rank
  std::vector<int64_t> to(hosts_.size(), 0), from(hosts_.size(), 0);   // by host
  for (int64_t l = 0; l < local; ++l) {
    for (size_t h : others) {
      leaves[static_cast<size_t>(l)] += block_of(l, kSend, h);
      comes[static_cast<size_t>(l)] += block_of(l, kRecv, h);
      to[h] += block_of(l, kSend, h);
      from[h] += block_of(l, kRecv, h);
    }
  }
  const auto me = static_cast<size_t>(local_.rank());
  at::Tensor out = buffer(leaves[me]), in = buffer(comes[me]);  // host by host
  std::byte* at = begin_of(out);
  for (size_t h : others) {
    for (int peer : hosts_[h]) append(at, ins[peer], send_bytes[static_cast<size_t>(peer)]);
  }
  at::Tensor gathered = buffer(leads() ? sum_of(leaves) : 0), dealt = buffer(leads() ? sum_of(comes) : 0);
  to_leader(out.data_ptr(), gathered.data_ptr(), leaves, deadline);
  if (leads()) {
    check_sizes(sizes, deadline);
    // [local rank][host] -> [host][local rank]
    at::Tensor sent = buffer(sum_of(to)), received = buffer(sum_of(from));
    at = begin_of(sent);
    for (size_t h : others) {
      const std::byte* row = begin_of(gathered);
      for (int64_t l = 0; l < local; row += leaves[static_cast<size_t>(l)], ++l) {
        const std::byte* block = row;
        for (size_t g : others) {
          if (g == h) break;
          block += block_of(l, kSend, g);
        }
        append(at, block, block_of(l, kSend, h));
      }
    }
    swap_across(received, from, sent, to, deadline);
    // [host][its rank][local rank] -> [local rank][host][its rank]
    std::vector<std::byte*> row(mine.size(), begin_of(dealt));
    for (size_t l = 1; l < mine.size(); ++l) row[l] = row[l - 1] + comes[l - 1];
    const std::byte* block = begin_of(received);
    for (size_t h : others) {
      for (int peer : hosts_[h]) {
        for (int64_t l = 0; l < local; ++l) {
          append(row[static_cast<size_t>(l)], block, size_of(l, kRecv, peer));
          block += size_of(l, kRecv, peer);
        }
      }
    }
  }
  from_leader(dealt.data_ptr(), in.data_ptr(), comes, deadline);
  const std::byte* part = begin_of(in);
  for (size_t h : others) {
    for (int peer : hosts_[h]) {
      copy_bytes(outs[peer], part, static_cast<size_t>(recv_bytes[static_cast<size_t>(peer)]));
      part += recv_bytes[static_cast<size_t>(peer)];
    }
  }
}

// Leaders tell each other what their ranks send, before a byte of it is sent. `sizes` as in all_to_all.
void Hosts::check_sizes(const std::vector<int64_t>& sizes, Deadline deadline) {
  const auto& mine = hosts_[static_cast<size_t>(host_)];
  std::vector<int64_t> said, splits;
  for (const auto& host : hosts_) {
    splits.push_back(static_cast<int64_t>(host.size() * mine.size()));
    for (size_t l = 0; l < mine.size(); ++l) {
      for (int peer : host) said.push_back(sizes[2 * l * static_cast<size_t>(size_) + static_cast<size_t>(peer)]);
    }
  }
  at::Tensor input = at::tensor(said, at::kLong), output = at::empty_like(input);
  swap_across(output, splits, input, splits, deadline);
  const auto* heard = output.const_data_ptr<int64_t>();
  for (const auto& host : hosts_) {
    for (int peer : host) {
      for (size_t l = 0; l < mine.size(); ++l, ++heard) {
        const int64_t expected = sizes[(2 * l + 1) * static_cast<size_t>(size_) + static_cast<size_t>(peer)];
        if (*heard == expected) continue;
        const std::string why = "the ranks of group '" + local_.name() + "' disagree: rank " + std::to_string(peer) +
                                " sends " + std::to_string(*heard) + " bytes to rank " + std::to_string(mine[l]) +
                                ", which expects " + std::to_string(expected) +
                                "; every rank must make the same calls, with sizes that match";
        local_.abort(why);
        watch_->wake();
        throw PeerError(why);
      }
    }
  }
}

void Hosts::reduce_scatter(at::Tensor& output, const at::Tensor& input, const std::vector<int64_t>& counts,
                           ReduceOp asked, Deadline deadline) {
  at::NoGradGuard no_grad;
  if (equal_ && std::all_of(counts.begin(), counts.end(), [&](int64_t n) { return n == counts[0]; })) {
    return reduce_scatter(output, input, asked, deadline);
  }
  ++calls_;
  Accumulator a(input, asked, size_);
  const at::Tensor flat = a.sum.view({-1});
  std::vector<int64_t> begins(counts.size(), 0), to;
  for (size_t r = 1; r < counts.size(); ++r) begins[r] = begins[r - 1] + counts[r - 1];
  std::vector<at::Tensor> rows;  // host by host
  for (const auto& host : hosts_) {
    to.push_back(0);
    for (int r : host) {
      rows.push_back(flat.narrow(0, begins[static_cast<size_t>(r)], counts[static_cast<size_t>(r)]));
      to.back() += rows.back().numel();
    }
  }
  at::Tensor sums = at::cat(rows);
  const DType dtype = reducible_dtype(sums, a.op);
  local_.reduce(sums.data_ptr(), leads() ? sums.data_ptr() : nullptr, sums.numel(), dtype, a.op, 0, deadline);
  const int64_t block = to[static_cast<size_t>(host_)];
  at::Tensor parts = at::empty({leads() ? static_cast<int64_t>(hosts_.size()) * block : 0}, sums.options());
  if (leads()) {
    swap_across(parts, std::vector<int64_t>(hosts_.size(), block), sums, to, deadline);
    std::vector<const void*> hosts_parts;
    for (size_t h = 0; h < hosts_.size(); ++h) {
      hosts_parts.push_back(begin_of(parts) + static_cast<int64_t>(h) * block * parts.element_size());
    }
    reduce_rows(parts.data_ptr(), hosts_parts.data(), static_cast<int>(hosts_.size()), block, dtype, a.op);
  }
  std::vector<int64_t> bytes;
  for (int r : hosts_[static_cast<size_t>(host_)]) {
    bytes.push_back(counts[static_cast<size_t>(r)] * sums.element_size());
  }
  a.sum = at::empty({output.numel()}, sums.options());
  from_leader(parts.data_ptr(), a.sum.data_ptr(), bytes, deadline);
  at::Tensor own = output.view({-1});
  a.store(own);
}

}  // namespace pypar
