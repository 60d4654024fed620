// Collectives over hosts whose parts differ in size, or whose numbers of ranks do. What several ranks of a host need
// crosses the network once: the leaders swap it, and each hands it out. What one rank has for one other goes straight
// there, through shared memory if that one is near.

#include <algorithm>
#include <numeric>
#include <utility>

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

}  // namespace

// `meanwhile` runs while gloo is at it. Splits by value: gloo moves them away.
void Hosts::swap(c10d::Backend& gloo, at::Tensor& output, std::vector<int64_t> output_splits, at::Tensor& input,
                 std::vector<int64_t> input_splits, Deadline deadline, const std::function<void()>& meanwhile) {
  finish("all_to_all", deadline, [&] {
    c10d::AllToAllOptions options;
    options.timeout = time_left(deadline);
    auto work = gloo.alltoall_base(output, input, output_splits, input_splits, options);
    if (meanwhile) meanwhile();
    return work;
  });
}

// bytes[r] to each rank of the host, one behind the other in `in`, which only the leader reads.
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

// Ranks of different hosts tell each other what they send: gloo ends the process that gets more than it expects.
void Hosts::check_sizes(const std::vector<int64_t>& sends, const std::vector<int64_t>& expects, Deadline deadline) {
  std::vector<int64_t> splits(sends.size(), 1);
  for (int r : hosts_[static_cast<size_t>(host_)]) splits[static_cast<size_t>(r)] = 0;
  std::vector<int64_t> far;
  for (size_t r = 0; r < sends.size(); ++r) {
    if (splits[r] != 0) far.push_back(sends[r]);
  }
  at::Tensor said = at::tensor(far, at::kLong), heard = at::empty_like(said);
  swap(*inner_.whole, heard, splits, said, splits, deadline);
  const auto* sent = heard.const_data_ptr<int64_t>();
  for (size_t r = 0; r < sends.size(); ++r) {
    if (splits[r] == 0 || *sent++ == expects[r]) continue;
    const std::string why = "the ranks of group '" + local_.name() + "' disagree: rank " + std::to_string(r) +
                            " sends " + std::to_string(sent[-1]) + " bytes to rank " + std::to_string(rank_) +
                            ", which expects " + std::to_string(expects[r]) +
                            "; every rank must make the same calls, with sizes that match";
    local_.abort(why);
    watch_->wake();
    throw PeerError(why);
  }
}

void Hosts::all_to_all(const void* const* ins, const std::vector<int64_t>& send_bytes, void* const* outs,
                       const std::vector<int64_t>& recv_bytes, Deadline deadline) {
  at::NoGradGuard no_grad;
  ++calls_;
  std::vector<int64_t> far_send = send_bytes, far_recv = recv_bytes, near_send, near_recv;
  std::vector<const void*> near_ins;
  std::vector<void*> near_outs;
  for (int r : hosts_[static_cast<size_t>(host_)]) {
    near_ins.push_back(ins[r]);
    near_outs.push_back(outs[r]);
    near_send.push_back(std::exchange(far_send[static_cast<size_t>(r)], 0));
    near_recv.push_back(std::exchange(far_recv[static_cast<size_t>(r)], 0));
  }
  check_sizes(far_send, far_recv, deadline);
  at::Tensor out = buffer(sum_of(far_send)), in = buffer(sum_of(far_recv));
  std::byte* at = begin_of(out);
  for (size_t r = 0; r < far_send.size(); at += far_send[r], ++r) {
    copy_bytes(at, ins[r], static_cast<size_t>(far_send[r]));
  }
  swap(*inner_.whole, in, far_recv, out, far_send, deadline,
       [&] { local_.all_to_all(near_ins.data(), near_send.data(), near_outs.data(), near_recv.data(), deadline); });
  at = begin_of(in);
  for (size_t r = 0; r < far_recv.size(); at += far_recv[r], ++r) {
    copy_bytes(outs[r], at, static_cast<size_t>(far_recv[r]));
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
    swap(*inner_.across, parts, std::vector<int64_t>(hosts_.size(), block), sums, to, deadline);
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
