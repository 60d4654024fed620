// Collectives of a group whose ranks are on several hosts: within a host through shared memory, between hosts through
// gloo, so that each byte crosses the network once per host and not once per rank.
#pragma once

#include <functional>
#include <memory>
#include <utility>
#include <vector>

#include <ATen/core/Tensor.h>
#include <torch/csrc/distributed/c10d/Backend.hpp>
#include <torch/csrc/distributed/c10d/Store.hpp>

#include "comm/communicator.h"

namespace pypar {

// The gloo groups that a group on several hosts needs. Made by Python: gloo's headers are not part of torch's wheel.
struct InnerGroups {
  c10::intrusive_ptr<c10d::Backend> whole;  // all ranks, in their order
  // One rank of each host, in the order of the hosts: of the same local rank when all hosts have as many, else the
  // first of each host (null on the others).
  c10::intrusive_ptr<c10d::Backend> across;
};

struct InnerRequest {
  c10::intrusive_ptr<c10d::Store> store;
  int rank, size;
  int across_index, across_rank, across_size;  // across_index: -1, not in one
  std::chrono::milliseconds timeout;
};
using InnerFactory = std::function<InnerGroups(const InnerRequest&)>;
// Set once, at import.
void set_inner_factory(InnerFactory factory);

class Hosts {
 public:
  Hosts(Communicator& local, std::vector<std::vector<int>> hosts, c10::intrusive_ptr<c10d::Store> store, int rank,
        int size, std::chrono::milliseconds timeout);

  // gloo over all ranks: messages, and the collectives that have no form of their own here.
  c10d::Backend& whole() const { return *inner_.whole; }
  template <typename Call>
  void run_whole(Call&& call) {
    finish([&] { return call(whole()); });
  }

  // Tensors are contiguous. Each returns when it is done.
  void all_reduce(at::Tensor& tensor, ReduceOp op, Deadline deadline);
  void broadcast(at::Tensor& tensor, int root, Deadline deadline);
  // output: the equal shards of all ranks, in rank order.
  void all_gather(at::Tensor& output, const at::Tensor& input, Deadline deadline);
  void reduce_scatter(at::Tensor& output, const at::Tensor& input, ReduceOp op, Deadline deadline);
  void barrier(Deadline deadline);

 private:
  using WorkPtr = c10::intrusive_ptr<c10d::Work>;

  bool leads() const { return local_.rank() == 0; }
  // Starts a call of gloo and waits for it. What gloo throws ends the call on the ranks of this host, too.
  void finish(const std::function<WorkPtr()>& start);
  // Rank of the group -> its host and its place there.
  std::pair<int, int> place_of(int rank) const;
  void sum_across(at::Tensor& tensor, c10d::ReduceOp op, Deadline deadline);
  void local_all_gather(const at::Tensor& input, at::Tensor& output, Deadline deadline);

  Communicator& local_;
  const std::vector<std::vector<int>> hosts_;
  const int rank_;
  const int size_;
  int host_ = 0;
  bool equal_ = true;  // all hosts have as many ranks
  InnerGroups inner_;
};

}  // namespace pypar
