#include "comm/hosts.h"

#include <algorithm>

#include <ATen/ATen.h>

#include "comm/interrupt.h"
#include "comm/tensors.h"
#include "pypar/signal.h"

namespace pypar {

namespace {

// Below this, one rank of each host talks for all: fewer messages. Above, all ranks of a host share the wire.
constexpr int64_t kLeaderBytes = 32 << 10;

InnerFactory& inner_factory() {
  static auto* factory = new InnerFactory;
  return *factory;
}

// Tags that no message has.
constexpr int kCutTag = 1 << 28;
constexpr int kProbeTag = kCutTag + 1;

// gloo has no abort: but a receive that times out closes all connections of its group, and with them ends all waits.
void cut(const InnerGroups& inner) {
  for (const auto& gloo : {inner.whole, inner.across}) {
    if (!gloo) continue;
    try {
      std::vector<at::Tensor> nothing{at::empty({1}, at::kByte)};
      gloo->recvAnysource(nothing, kCutTag)->wait(std::chrono::milliseconds(1));
    } catch (const std::exception&) {
    }
  }
}

// Of ranks on other hosts: a receive can't even be posted.
std::vector<int> closed(const InnerGroups& inner, const Communicator& local) {
  std::vector<int> places;
  for (int place = local.world(); place < local.num_places(); ++place) {
    try {
      std::vector<at::Tensor> nothing{at::empty({1}, at::kByte)};
      inner.whole->recv(nothing, local.group_rank(place), kProbeTag);
    } catch (const std::exception&) {
      places.push_back(place);
    }
  }
  return places;
}

c10d::ReduceOp gloo_op(ReduceOp op) {
  switch (op) {
    case ReduceOp::product: return c10d::ReduceOp::PRODUCT;
    case ReduceOp::min: return c10d::ReduceOp::MIN;
    case ReduceOp::max: return c10d::ReduceOp::MAX;
    case ReduceOp::band: return c10d::ReduceOp::BAND;
    case ReduceOp::bor: return c10d::ReduceOp::BOR;
    case ReduceOp::bxor: return c10d::ReduceOp::BXOR;
    default: return c10d::ReduceOp::SUM;
  }
}

}  // namespace

std::chrono::milliseconds time_left(Deadline deadline) {
  if (deadline.at_ns == 0) return c10d::kUnsetTimeout;
  const uint64_t now = now_ns();
  return std::chrono::milliseconds(
      std::max<uint64_t>(1, deadline.at_ns > now ? (deadline.at_ns - now) / 1'000'000 : 1));
}

Accumulator::Accumulator(const at::Tensor& tensor, ReduceOp asked, int size)
    : op(asked == ReduceOp::avg ? ReduceOp::sum : asked) {
  auto type = tensor.scalar_type();
  if (type == at::kHalf || type == at::kBFloat16) type = at::kFloat;
  if (type == at::kShort || type == at::kBool) type = at::kInt;
  if (tensor.scalar_type() == at::kBool)
    op = op == ReduceOp::product ? ReduceOp::min : op == ReduceOp::sum ? ReduceOp::max : op;
  if (asked == ReduceOp::avg) divisor = size;
  sum = tensor.to(type);
}

void Accumulator::store(at::Tensor& tensor) {
  if (divisor != 1) sum.div_(divisor);
  if (!tensor.is_same(sum)) tensor.copy_(sum);
}

void set_inner_factory(InnerFactory factory) {
  inner_factory() = std::move(factory);
}

Hosts::Hosts(std::shared_ptr<Communicator> local, std::vector<std::vector<int>> hosts,
             c10::intrusive_ptr<c10d::Store> store, int rank, int size, std::chrono::milliseconds timeout)
    : shared_(std::move(local)),
      local_(*shared_),
      hosts_(std::move(hosts)),
      rank_(rank),
      size_(size),
      store_(std::move(store)) {
  host_ = place_of(rank).first;
  for (const auto& host : hosts_) equal_ = equal_ && host.size() == hosts_[0].size();
  watch_ = std::make_shared<Watch>(shared_, hosts_, host_, store_);
  InnerRequest request{store_, rank, size, -1, host_, static_cast<int>(hosts_.size()), timeout};
  if (equal_ || leads()) request.across_index = local_.rank();
  if (!inner_factory()) throw ArgumentError("pypar: the group spans hosts; import pypar to connect them");
  inner_ = inner_factory()(request);
  watch_->start({[inner = inner_, slot = link_slot_] {
                   cut(inner);
                   std::lock_guard<std::mutex> lock(slot->mutex);
                   slot->cut = true;
                   if (slot->links) slot->links->cut();
                 },
                 [inner = inner_, local = shared_] { return closed(inner, *local); }});
}

Hosts::~Hosts() {
  stop();
}

void Hosts::stop() {
  local_.leave(calls_);
  watch_->stop();
}

std::pair<int, int> Hosts::place_of(int rank) const {
  for (size_t h = 0; h < hosts_.size(); ++h) {
    const auto found = std::find(hosts_[h].begin(), hosts_[h].end(), rank);
    if (found != hosts_[h].end()) return {static_cast<int>(h), static_cast<int>(found - hosts_[h].begin())};
  }
  throw ArgumentError("pypar: rank " + std::to_string(rank) + " is on no host");
}

void Hosts::run(const std::function<void(Deadline)>& call) {
  std::function<void(const std::function<void()>&)> turn;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    turn = turn_;
  }
  if (!turn) throw PeerError("group '" + local_.name() + "' was destroyed");
  turn([&] { call(local_.default_deadline()); });
}

void Hosts::set_turn(std::function<void(const std::function<void()>&)> turn) {
  std::lock_guard<std::mutex> lock(mutex_);
  turn_ = std::move(turn);
}

void Hosts::finish(const char* what, Deadline deadline, const std::function<WorkPtr()>& start) {
  await(what, deadline, [&] { start()->wait(); });
}

void Hosts::await(const char* what, Deadline deadline, const std::function<void()>& wait) {
  local_.check_alive(local_.rank(), what, {});
  const Watch::Call call(*watch_, calls_);
  try {
    wait();
  } catch (const Interrupted&) {
    watch_->wake();  // the group is over: the others shall hear why
    throw;
  } catch (const std::exception& error) {
    watch_->fail(std::string(what) + ", call " + std::to_string(calls_) + " between hosts", error.what(), deadline);
  }
}

Links::Check Hosts::link_check(const char* what, Deadline deadline) const {
  return [this, what, deadline] {
    local_.check_interrupt(what);
    local_.check_alive(local_.rank(), what, deadline);
  };
}

Links& Hosts::links(const std::vector<int>& peers, const Links::Check& check) {
  if (!link_slot_->links) {  // only a call in its turn makes them
    auto made = std::make_unique<Links>(*store_, rank_, peers, check);
    std::lock_guard<std::mutex> lock(link_slot_->mutex);
    link_slot_->links = std::move(made);
    if (link_slot_->cut) link_slot_->links->cut();
  }
  return *link_slot_->links;
}

void Hosts::sum_across(at::Tensor& tensor, c10d::ReduceOp op, Deadline deadline) {
  finish("all_reduce", deadline, [&] {
    std::vector<at::Tensor> tensors{tensor};
    c10d::AllreduceOptions options;
    options.reduceOp = op;
    options.timeout = time_left(deadline);
    return inner_.across->allreduce(tensors, options);
  });
}

void Hosts::local_all_gather(const at::Tensor& input, at::Tensor& output, Deadline deadline) {
  const std::vector<int64_t> bytes(static_cast<size_t>(local_.world()), bytes_of(input));
  std::vector<void*> parts;
  for (int r = 0; r < local_.world(); ++r)
    parts.push_back(static_cast<std::byte*>(output.data_ptr()) + r * bytes_of(input));
  local_.all_gather(input.data_ptr(), bytes.data(), parts.data(), deadline);
}

void Hosts::all_reduce(at::Tensor& tensor, ReduceOp asked, Deadline deadline) {
  at::NoGradGuard no_grad;
  ++calls_;
  Accumulator a(tensor, asked, size_);
  at::Tensor flat = a.sum.view({-1});
  const DType dtype = reducible_dtype(flat, a.op);
  const int local = local_.world();
  if (!equal_ || bytes_of(flat) <= kLeaderBytes) {
    local_.reduce(flat.data_ptr(), leads() ? flat.data_ptr() : nullptr, flat.numel(), dtype, a.op, 0, deadline);
    if (leads()) sum_across(flat, gloo_op(a.op), deadline);
    local_.broadcast(flat.data_ptr(), bytes_of(flat), 0, deadline);
  } else {
    const int64_t per = (flat.numel() + local - 1) / local;
    std::vector<int64_t> counts, bytes;
    std::vector<void*> parts;
    for (int r = 0; r < local; ++r) {
      const int64_t begin = std::min(flat.numel(), r * per);
      counts.push_back(std::min(flat.numel(), begin + per) - begin);
      bytes.push_back(counts.back() * flat.element_size());
      parts.push_back(static_cast<std::byte*>(flat.data_ptr()) + begin * flat.element_size());
    }
    at::Tensor shard = at::empty({counts[static_cast<size_t>(local_.rank())]}, flat.options());
    local_.reduce_scatter(parts.data(), counts.data(), shard.data_ptr(), dtype, a.op, deadline);
    sum_across(shard, gloo_op(a.op), deadline);
    local_.all_gather(shard.data_ptr(), bytes.data(), parts.data(), deadline);
  }
  a.store(tensor);
}

void Hosts::broadcast(at::Tensor& tensor, int root, Deadline deadline) {
  ++calls_;
  const auto [root_host, root_place] = place_of(root);
  if (host_ == root_host) local_.broadcast(tensor.data_ptr(), bytes_of(tensor), root_place, deadline);
  if (leads()) {
    finish("broadcast", deadline, [&, source = root_host] {
      std::vector<at::Tensor> tensors{tensor};
      c10d::BroadcastOptions options;
      options.rootRank = source;
      options.timeout = time_left(deadline);
      return inner_.across->broadcast(tensors, options);
    });
  }
  if (host_ != root_host) local_.broadcast(tensor.data_ptr(), bytes_of(tensor), 0, deadline);
}

void Hosts::all_gather(at::Tensor& output, const at::Tensor& input, Deadline deadline) {
  at::NoGradGuard no_grad;
  if (!equal_) {
    const std::vector<int64_t> bytes(static_cast<size_t>(size_), bytes_of(input));
    std::vector<void*> outs;
    for (int r = 0; r < size_; ++r) outs.push_back(static_cast<std::byte*>(output.data_ptr()) + r * bytes_of(input));
    return all_gather(input.data_ptr(), bytes, outs.data(), deadline);
  }
  ++calls_;
  c10d::AllgatherOptions options;
  options.timeout = time_left(deadline);
  const auto num_hosts = static_cast<int64_t>(hosts_.size());
  at::Tensor own = input.view({-1});
  if (num_hosts == size_) {  // one rank each, and hosts are in the order of their ranks: nothing is left to arrange
    at::Tensor all = output.view({-1});
    finish("all_gather", deadline, [&] { return inner_.across->_allgather_base(all, own, options); });
    return;
  }
  at::Tensor across = at::empty({num_hosts * own.numel()}, own.options());
  finish("all_gather", deadline, [&] { return inner_.across->_allgather_base(across, own, options); });
  at::Tensor all = at::empty({local_.world(), num_hosts, own.numel()}, own.options());
  local_all_gather(across, all, deadline);
  at::Tensor rows = output.view({size_, own.numel()});
  for (int r = 0; r < size_; ++r) {
    const auto [host, place] = place_of(r);
    rows[r].copy_(all[place][host]);
  }
}

void Hosts::reduce_scatter(at::Tensor& output, const at::Tensor& input, ReduceOp asked, Deadline deadline) {
  at::NoGradGuard no_grad;
  if (!equal_) {
    const std::vector<int64_t> counts(static_cast<size_t>(size_), output.numel());
    return reduce_scatter(output, input, counts, asked, deadline);
  }
  ++calls_;
  Accumulator a(input, asked, size_);
  const auto num_hosts = static_cast<int64_t>(hosts_.size());
  const int64_t n = output.numel();
  // By the place of the receiver on its host, then by its host: a local reduce_scatter leaves one row per host.
  at::Tensor rows = at::empty({local_.world(), num_hosts, n}, a.sum.options());
  for (int r = 0; r < size_; ++r) {
    const auto [host, place] = place_of(r);
    rows[place][host].copy_(a.sum.view({size_, n})[r]);
  }
  at::Tensor mine = at::empty({num_hosts * n}, rows.options());
  const std::vector<int64_t> counts(static_cast<size_t>(local_.world()), num_hosts * n);
  std::vector<void*> parts;
  for (int r = 0; r < local_.world(); ++r) parts.push_back(rows[r].data_ptr());
  local_.reduce_scatter(parts.data(), counts.data(), mine.data_ptr(), reducible_dtype(mine, a.op), a.op, deadline);
  sum_across(mine, gloo_op(a.op), deadline);
  a.sum = mine.view({num_hosts, n})[host_];
  at::Tensor flat = output.view({-1});
  a.store(flat);
}

void Hosts::barrier(Deadline deadline) {
  ++calls_;
  local_.barrier(deadline);
  if (leads()) {
    finish("barrier", deadline, [&] {
      c10d::BarrierOptions options;
      options.timeout = time_left(deadline);
      return inner_.across->barrier(options);
    });
  }
  local_.barrier(deadline);
}

}  // namespace pypar
