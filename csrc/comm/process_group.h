// The backend "pypar" of torch.distributed on CPU: collectives through shared memory, and through gloo between hosts.
//
// A call that need not be asynchronous runs in the calling thread, at once, when nothing is queued before it. An
// asynchronous one is queued; the group's worker thread runs it, or the thread that waits for it does.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include <torch/csrc/distributed/c10d/Backend.hpp>
#include <torch/csrc/distributed/c10d/Store.hpp>

#include "comm/communicator.h"
#include "comm/hosts.h"
#include "comm/messages.h"
#include "comm/rings.h"
#include "comm/work.h"

namespace pypar {

inline constexpr const char* kBackendName = "pypar";

class ProcessGroup : public c10d::Backend {
 public:
  using Tensors = std::vector<at::Tensor>;
  using WorkPtr = c10::intrusive_ptr<c10d::Work>;
  using Milliseconds = std::chrono::milliseconds;

  struct Options : c10d::Backend::Options {
    explicit Options(Milliseconds timeout) : c10d::Backend::Options(kBackendName, timeout) {}
  };

  // Collective over the group. `name`: of the c10d group, unique in the process.
  ProcessGroup(c10::intrusive_ptr<c10d::Store> store, int rank, int size, c10::intrusive_ptr<Options> options);
  ~ProcessGroup() override;

  const std::string getBackendName() const override { return kBackendName; }
  c10::intrusive_ptr<c10d::Backend::Options> getBackendOptions() override { return options_; }
  void setTimeout(Milliseconds timeout) override {
    options_->timeout = timeout;
    communicator_->set_timeout(timeout);
  }
  void setGroupUid(const std::string& name) override;
  bool supportsSplitting() const override { return true; }
  c10::intrusive_ptr<c10d::Backend> split(const c10::intrusive_ptr<c10d::Store>& store, const std::vector<int>& ranks,
                                          const c10::intrusive_ptr<c10d::Backend::Options>& options) override;
  void setSequenceNumberForGroup() override {}
  uint64_t getSequenceNumberForGroup() override { return sequence_; }
  c10d::ErrorType getError() override;
  void abort() override;
  void shutdown() override;

  WorkPtr broadcast(Tensors& tensors, const c10d::BroadcastOptions& options) override;
  WorkPtr allreduce(Tensors& tensors, const c10d::AllreduceOptions& options) override;
  WorkPtr allreduce_sparse(Tensors& tensors, const c10d::AllreduceOptions& options) override;
  WorkPtr allreduce_coalesced(Tensors& tensors, const c10d::AllreduceCoalescedOptions& options) override;
  WorkPtr reduce(Tensors& tensors, const c10d::ReduceOptions& options) override;
  WorkPtr allgather(TensorLists& outputs, Tensors& inputs, const c10d::AllgatherOptions& options) override;
  WorkPtr _allgather_base(at::Tensor& output, at::Tensor& input, const c10d::AllgatherOptions& options) override;
  WorkPtr allgather_coalesced(TensorLists& outputs, Tensors& inputs, const c10d::AllgatherOptions& options) override;
  WorkPtr allgather_into_tensor_coalesced(Tensors& outputs, Tensors& inputs,
                                          const c10d::AllgatherOptions& options) override;
  WorkPtr gather(TensorLists& outputs, Tensors& inputs, const c10d::GatherOptions& options) override;
  WorkPtr scatter(Tensors& outputs, TensorLists& inputs, const c10d::ScatterOptions& options) override;
  WorkPtr reduce_scatter(Tensors& outputs, TensorLists& inputs, const c10d::ReduceScatterOptions& options) override;
  WorkPtr _reduce_scatter_base(at::Tensor& output, at::Tensor& input,
                               const c10d::ReduceScatterOptions& options) override;
  WorkPtr reduce_scatter_tensor_coalesced(Tensors& outputs, Tensors& inputs,
                                          const c10d::ReduceScatterOptions& options) override;
  WorkPtr alltoall_base(at::Tensor& output, at::Tensor& input, std::vector<int64_t>& output_splits,
                        std::vector<int64_t>& input_splits, const c10d::AllToAllOptions& options) override;
  WorkPtr alltoall(Tensors& outputs, Tensors& inputs, const c10d::AllToAllOptions& options) override;
  WorkPtr barrier(const c10d::BarrierOptions& options) override;
  void monitoredBarrier(const c10d::BarrierOptions& options, bool wait_all_ranks) override;

  WorkPtr send(Tensors& tensors, int dst, int tag) override;
  WorkPtr recv(Tensors& tensors, int src, int tag) override;
  WorkPtr recvAnysource(Tensors& tensors, int tag) override;

  // The ranks of this host. All ranks of the group, when spans_hosts() is false.
  const std::shared_ptr<Communicator>& communicator() const { return communicator_; }
  bool spans_hosts() const { return hosts_ != nullptr; }
  // Ranks by host.
  const std::vector<std::vector<int>>& hosts() const { return partition_; }

 private:
  // `run(deadline)` does it; here or later, see the top of the file.
  template <typename Run>
  WorkPtr launch(c10d::OpType type, const char* title, bool async, Milliseconds timeout, const Tensors& inputs,
                 TensorLists outputs, Run&& run);
  // Over one host or several, sizes in bytes by rank.
  void gather_all(const void* in, const std::vector<int64_t>& bytes, void* const* outs, Deadline deadline, DType dtype);
  void swap_all(const void* const* ins, const std::vector<int64_t>& send_bytes, void* const* outs,
                const std::vector<int64_t>& recv_bytes, Deadline deadline, DType dtype);
  // Where a rank of the group is in the communicator.
  int place_of(int rank) const;
  // Runs `call` in this thread, after what is queued.
  void take_turn(const std::function<void()>& call);
  WorkPtr launch_recv(Tensors& tensors, int src, int tag);
  Deadline deadline(Milliseconds timeout) const;
  void check_open() const;
  void check_root(const char* what, int64_t root) const;
  void barrier_arrive(Milliseconds timeout, bool wait_all_ranks, int64_t tag);

  c10::intrusive_ptr<c10d::Store> store_;
  c10::intrusive_ptr<Options> options_;
  std::vector<std::vector<int>> partition_;
  std::shared_ptr<Communicator> communicator_;
  std::unique_ptr<Rings> rings_;
  std::shared_ptr<Hosts> hosts_;        // null: one host
  std::unique_ptr<Messages> messages_;  // to other hosts
  std::atomic<uint64_t> sequence_{0};   // of collectives: the same on every rank
  std::atomic<uint64_t> num_messages_{0};
  std::atomic<int64_t> num_monitored_barriers_{0};
  std::string registered_name_;
  std::atomic<bool> closed_{false};
  WorkQueue queue_{
      [this](const std::string& what) { communicator_->check_interrupt(what); }};  // last: its thread uses the others
};

}  // namespace pypar
