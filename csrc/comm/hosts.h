// Collectives of a group whose ranks are on several hosts: within a host through shared memory, between hosts through
// gloo or (rows of matmuls) through links of our own, so that each byte crosses the network once per host and not once
// per rank.
#pragma once

#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <utility>
#include <vector>

#include <ATen/core/Tensor.h>
#include <torch/csrc/distributed/c10d/Backend.hpp>
#include <torch/csrc/distributed/c10d/Store.hpp>

#include "comm/calibration.h"
#include "comm/communicator.h"
#include "comm/links.h"
#include "comm/watch.h"

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
  Hosts(std::shared_ptr<Communicator> local, std::vector<std::vector<int>> hosts, c10::intrusive_ptr<c10d::Store> store,
        int rank, int size, std::chrono::milliseconds timeout);
  ~Hosts();
  // This rank will call no more.
  void stop();

  // gloo over all ranks: messages, monitored barriers and sparse tensors.
  const c10::intrusive_ptr<c10d::Backend>& whole() const { return inner_.whole; }
  template <typename Call>
  void run_whole(Deadline deadline, Call&& call) {
    ++calls_;
    finish("a call of all ranks", deadline, [&] { return call(*inner_.whole); });
  }
  const std::shared_ptr<Watch>& watch() const { return watch_; }
  int num_hosts() const { return static_cast<int>(hosts_.size()); }
  // Does any host hold more than one rank, so that it adds shares before they travel?
  bool adds_locally() const { return static_cast<int>(hosts_.size()) < size_; }
  // Runs a call of the operators in its turn: after the calls of the group that were issued before it.
  void run(const std::function<void(Deadline)>& call);
  // How run() waits for its turn; null: the group is gone.
  void set_turn(std::function<void(const std::function<void()>&)> turn);

  // Tensors are contiguous. Each returns when it is done.
  void all_reduce(at::Tensor& tensor, ReduceOp op, Deadline deadline);
  void broadcast(at::Tensor& tensor, int root, Deadline deadline);
  // output: the equal shards of all ranks, in rank order.
  void all_gather(at::Tensor& output, const at::Tensor& input, Deadline deadline);
  void reduce_scatter(at::Tensor& output, const at::Tensor& input, ReduceOp op, Deadline deadline);
  void barrier(Deadline deadline);

  // Of any sizes, by rank of the group; see hosts_uneven.cpp. outs[s]: bytes[s] from rank s; `in`: bytes[rank].
  void all_gather(const void* in, const std::vector<int64_t>& bytes, void* const* outs, Deadline deadline);
  void all_to_all(const void* const* ins, const std::vector<int64_t>& send_bytes, void* const* outs,
                  const std::vector<int64_t>& recv_bytes, Deadline deadline);
  // input: one behind the other, counts[r] elements for rank r.
  void reduce_scatter(at::Tensor& output, const at::Tensor& input, const std::vector<int64_t>& counts, ReduceOp op,
                      Deadline deadline);

  // As Communicator's of the same names, over all ranks; src and dst count them, see hosts_rows.cpp. num_chunks: 1, the
  // rows travel all at once, before they are consumed or after they were produced; more, a chunk travels while another
  // is consumed or produced. Sums: the ranks of a host in their order, then the hosts in theirs.
  void all_gather_rows(const void* in, const std::vector<int64_t>& rows, int64_t row_items, int num_chunks,
                       const Communicator::ConsumeRows& consume, Deadline deadline, DType dtype);
  void reduce_scatter_rows(const std::vector<int64_t>& rows, int64_t row_items, int num_chunks,
                           const Communicator::ProduceRows& produce, void* out, const Communicator::MoreRows& more,
                           Deadline deadline, DType dtype);
  void all_reduce_rows(int64_t rows, int64_t row_items, int num_chunks, const Communicator::MakeRows& produce,
                       void* out, const Communicator::MoreRows& more, Deadline deadline, DType dtype);

  // What the links and the matmuls of this group reach: measured by the first call, which is one of all ranks, unless
  // it was set. Within run().
  Calibration calibration(Deadline deadline);
  // Nothing: the next call measures again.
  void set_calibration(const std::optional<Calibration>& calibration);

 private:
  struct RowCall;
  using WorkPtr = c10::intrusive_ptr<c10d::Work>;

  // Made by the first call with rows, which is one of all ranks.
  struct LinkSlot {
    std::mutex mutex;
    std::unique_ptr<Links> links;
    bool cut = false;
  };
  Links& links(const std::vector<int>& peers, const Links::Check& check);
  // Ends a wait in the links: the group is over, the deadline passed, this rank was interrupted.
  Links::Check link_check(const char* what, Deadline deadline) const;

  bool leads() const { return local_.rank() == 0; }
  // Starts a call of gloo and waits for it. What gloo throws ends the group.
  void finish(const char* what, Deadline deadline, const std::function<WorkPtr()>& start);
  void await(const char* what, Deadline deadline, const std::function<void()>& wait);
  Calibration measure(Deadline deadline);
  void all_reduce_few_rows(int64_t rows, int64_t row_items, void* out, const Communicator::MoreRows& more,
                           Deadline deadline, DType dtype);
  void swap(c10d::Backend& gloo, at::Tensor& output, std::vector<int64_t> output_splits, at::Tensor& input,
            std::vector<int64_t> input_splits, Deadline deadline, const std::function<void()>& meanwhile = nullptr);
  void check_sizes(const std::vector<int64_t>& sends, const std::vector<int64_t>& expects, Deadline deadline);
  void from_leader(const void* in, void* out, const std::vector<int64_t>& bytes, Deadline deadline);
  // Rank of the group -> its host and its place there.
  std::pair<int, int> place_of(int rank) const;
  void sum_across(at::Tensor& tensor, c10d::ReduceOp op, Deadline deadline);
  void local_all_gather(const at::Tensor& input, at::Tensor& output, Deadline deadline);

  const std::shared_ptr<Communicator> shared_;
  Communicator& local_;
  const std::vector<std::vector<int>> hosts_;
  const int rank_;
  const int size_;
  int host_ = 0;
  bool equal_ = true;  // all hosts have as many ranks
  const c10::intrusive_ptr<c10d::Store> store_;
  InnerGroups inner_;
  const std::shared_ptr<LinkSlot> link_slot_ = std::make_shared<LinkSlot>();
  std::shared_ptr<Watch> watch_;
  std::atomic<uint64_t> calls_{0};  // the same on all ranks at the same call
  std::mutex mutex_;                // of the next two
  std::function<void(const std::function<void()>&)> turn_;
  std::optional<Calibration> calibration_;
};

// A reduction as gloo can do it without rounding twice: half types in float32, int16 (which gloo lacks) in int32, bool
// as numbers, a mean as a sum.
struct Accumulator {
  Accumulator(const at::Tensor& tensor, ReduceOp asked, int size);
  void store(at::Tensor& tensor);
  ReduceOp op;
  int divisor = 1;
  at::Tensor sum;
};

// What is left of a deadline, as c10d's options take it.
std::chrono::milliseconds time_left(Deadline deadline);

}  // namespace pypar
