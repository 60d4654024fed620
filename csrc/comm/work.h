// What an operation of the process group returns, and the queue in which collectives run in order.
#pragma once

#include <condition_variable>
#include <deque>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

#include <ATen/ThreadLocalState.h>
#include <torch/csrc/distributed/c10d/Work.hpp>

#include "comm/rings.h"

namespace pypar {

using TensorLists = std::vector<std::vector<at::Tensor>>;

// A finished operation, or one that somebody else will finish with complete().
class Work : public c10d::Work {
 public:
  // `inputs`: for the profiler alone; null when it isn't running, which saves an allocation per call.
  Work(int rank, c10d::OpType type, uint64_t sequence, TensorLists outputs, const char* profiling_title,
       const std::vector<at::Tensor>* inputs);

  void complete(std::exception_ptr error = nullptr);

  std::vector<at::Tensor> result() override;
  c10::intrusive_ptr<c10::ivalue::Future> getFuture() override;
  uint64_t getSequencenumber() const override { return sequence_; }

 protected:
  bool done();
  bool wait_for(std::chrono::milliseconds timeout);  // false: it passed
  [[noreturn]] void throw_timeout(std::chrono::milliseconds timeout) const;

 private:
  void settle(c10::ivalue::Future& future);

  const uint64_t sequence_;
  TensorLists outputs_;
  c10::intrusive_ptr<c10::ivalue::Future> future_;
  bool settled_ = false;  // outcome_ is final; the future, if there is one, has it or is getting it
  std::exception_ptr outcome_;
};

class WorkQueue;

// A collective that runs later, in the group's worker thread or in a thread that waits for it.
class QueuedWork : public Work {
 public:
  QueuedWork(WorkQueue& queue, std::function<void()> body, int rank, c10d::OpType type, uint64_t sequence,
             TensorLists outputs, const char* profiling_title, const std::vector<at::Tensor>* inputs);
  bool wait(std::chrono::milliseconds timeout) override;

 private:
  friend class WorkQueue;
  WorkQueue* queue_;
  std::function<void()> body_;
  bool started_ = false;  // guarded by the queue
  at::ThreadLocalState thread_state_;
};

// Runs collectives one at a time, in the order in which they were issued.
class WorkQueue {
 public:
  // `check(what)` is called between slices of every wait and ends it by throwing.
  explicit WorkQueue(std::function<void(const std::string& what)> check) : check_(std::move(check)) {}
  ~WorkQueue();
  // True: nothing is queued or running, and the caller runs its operation now; it calls leave() after.
  bool try_enter();
  void leave();
  void push(c10::intrusive_ptr<QueuedWork> work);
  // Runs what is queued before `work`, and `work`, unless the worker thread is at it.
  void help(QueuedWork& work, std::chrono::milliseconds timeout);
  // Waits until everything issued so far is done, running it.
  void drain();
  // No more is taken; what is queued ends with an error.
  void close(const std::string& why);

 private:
  friend class QueuedWork;
  template <typename Ready>
  void wait_until(std::unique_lock<std::mutex>& lock, const char* what, Ready&& ready);
  void run_front(std::unique_lock<std::mutex>& lock);
  void run_worker();

  const std::function<void(const std::string&)> check_;
  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<c10::intrusive_ptr<QueuedWork>> queue_;
  bool busy_ = false;
  bool closed_ = false;
  std::string why_;
  std::thread worker_;
};

// A send or a receive that is on its way.
class RingWork : public Work {
 public:
  RingWork(Rings& rings, std::shared_ptr<RingOp> op, int rank, c10d::OpType type, uint64_t sequence,
           TensorLists outputs, const char* profiling_title, const std::vector<at::Tensor>* inputs);
  bool wait(std::chrono::milliseconds timeout) override;
  void abort() override;
  int sourceRank() const override { return rings_.group_rank(op_->source); }

 private:
  Rings& rings_;
  std::shared_ptr<RingOp> op_;
};

// A receive that was complete when it was issued.
class ReceivedWork : public Work {
 public:
  template <typename... Args>
  explicit ReceivedWork(int source, Args&&... args) : Work(std::forward<Args>(args)...), source_(source) {}
  int sourceRank() const override { return source_; }

 private:
  const int source_;
};

}  // namespace pypar
