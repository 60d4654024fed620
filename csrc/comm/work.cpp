#include "comm/work.h"

#include <ATen/record_function.h>

#include "comm/errors.h"

namespace pypar {

namespace {

constexpr std::chrono::milliseconds kSlice(20);  // how late a signal of this rank is noticed

std::optional<std::vector<at::Tensor>> profiled(const std::vector<at::Tensor>* inputs) {
  return inputs == nullptr ? std::nullopt : std::make_optional(*inputs);
}

c10::intrusive_ptr<c10::ivalue::Future> make_future(const TensorLists& outputs) {
  const auto list = c10::ListType::create(c10::TensorType::get());
  return c10::make_intrusive<c10::ivalue::Future>(outputs.size() > 1 ? c10::ListType::create(list) : list);
}

}  // namespace

Work::Work(int rank, c10d::OpType type, uint64_t sequence, TensorLists outputs, const char* profiling_title,
           const std::vector<at::Tensor>* inputs)
    : c10d::Work(rank, type, at::hasCallbacks() ? profiling_title : nullptr,
                 at::hasCallbacks() ? profiled(inputs) : std::nullopt),
      sequence_(sequence),
      outputs_(std::move(outputs)) {}

// The future first: who waited for the work may rely on what its callbacks did.
void Work::complete(std::exception_ptr error) {
  c10::intrusive_ptr<c10::ivalue::Future> future;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    if (settled_) return;
    settled_ = true;
    outcome_ = error;
    future = future_;
  }
  if (future) settle(*future);
  finish(error);
}

void Work::settle(c10::ivalue::Future& future) {
  if (outcome_) {
    future.setError(outcome_);
  } else if (outputs_.size() > 1) {
    future.markCompleted(c10::IValue(outputs_));
  } else {
    future.markCompleted(c10::IValue(outputs_.empty() ? std::vector<at::Tensor>() : outputs_[0]));
  }
}

c10::intrusive_ptr<c10::ivalue::Future> Work::getFuture() {
  std::unique_lock<std::mutex> lock(mutex_);
  if (future_) return future_;
  future_ = make_future(outputs_);
  auto future = future_;
  const bool settle_here = settled_;
  lock.unlock();
  if (settle_here) settle(*future);
  return future;
}

std::vector<at::Tensor> Work::result() {
  TORCH_CHECK(isCompleted(), "Work needs to be completed before calling result(); call wait() first");
  TORCH_CHECK(outputs_.size() <= 1, "work result does not support list of lists, use .getFuture() and value()");
  return outputs_.empty() ? std::vector<at::Tensor>() : outputs_[0];
}

bool Work::done() {
  std::lock_guard<std::mutex> lock(mutex_);
  return completed_;
}

bool Work::wait_for(std::chrono::milliseconds timeout) {
  std::unique_lock<std::mutex> lock(mutex_);
  if (timeout == kNoTimeout) {
    cv_.wait(lock, [&] { return completed_; });
    return true;
  }
  return cv_.wait_for(lock, timeout, [&] { return completed_; });
}

void Work::throw_timeout(std::chrono::milliseconds timeout) const {
  throw PythonPeerError("rank " + std::to_string(rank_) + ": " + c10d::opTypeToString(retrieveOpType()) + " (call " +
                        std::to_string(sequence_) + ") is not done " + std::to_string(timeout.count()) +
                        " ms after wait(timeout) was called; it goes on until the timeout of the group");
}

QueuedWork::QueuedWork(WorkQueue& queue, std::function<void()> body, int rank, c10d::OpType type, uint64_t sequence,
                       TensorLists outputs, const char* profiling_title, const std::vector<at::Tensor>* inputs)
    : Work(rank, type, sequence, std::move(outputs), profiling_title, inputs), queue_(&queue), body_(std::move(body)) {}

bool QueuedWork::wait(std::chrono::milliseconds timeout) {
  const auto until = std::chrono::steady_clock::now() + timeout;
  with_python_errors([&] {
    if (!done()) queue_->help(*this, timeout);
    while (!wait_for(kSlice)) {
      if (timeout != kNoTimeout && std::chrono::steady_clock::now() >= until) throw_timeout(timeout);
      queue_->check_(c10d::opTypeToString(retrieveOpType()));
    }
  });
  if (auto error = exception()) std::rethrow_exception(error);
  return true;
}

// Only the thread that Python calls signal handlers in is ever stopped by check_; it runs them without the lock.
template <typename Ready>
void WorkQueue::wait_until(std::unique_lock<std::mutex>& lock, const char* what, Ready&& ready) {
  while (!changed_.wait_for(lock, kSlice, ready)) {
    lock.unlock();
    check_(what);
    lock.lock();
  }
}

WorkQueue::~WorkQueue() {
  close("the process group was destroyed");
  if (worker_.joinable()) worker_.join();
}

bool WorkQueue::try_enter() {
  std::lock_guard<std::mutex> lock(mutex_);
  if (closed_) throw PythonPeerError(why_);
  if (busy_ || !queue_.empty()) return false;
  busy_ = true;
  return true;
}

void WorkQueue::leave() {
  std::lock_guard<std::mutex> lock(mutex_);
  busy_ = false;
  changed_.notify_all();
}

void WorkQueue::push(c10::intrusive_ptr<QueuedWork> work) {
  std::lock_guard<std::mutex> lock(mutex_);
  if (closed_) throw PythonPeerError(why_);
  queue_.push_back(std::move(work));
  if (!worker_.joinable()) worker_ = std::thread([this] { run_worker(); });
  changed_.notify_all();
}

void WorkQueue::run_front(std::unique_lock<std::mutex>& lock) {
  auto work = std::move(queue_.front());
  queue_.pop_front();
  work->started_ = true;
  busy_ = true;
  lock.unlock();
  std::exception_ptr error, interrupted;
  {
    at::ThreadLocalStateGuard state(work->thread_state_);
    try {
      work->body_();
    } catch (const Interrupted& stopped) {
      // Meant for the thread that runs this, not for whoever waits for this work.
      interrupted = std::current_exception();
      error = std::make_exception_ptr(PythonPeerError(stopped.what()));
    } catch (...) {
      error = for_python(std::current_exception());
    }
    work->body_ = nullptr;
    lock.lock();
    busy_ = false;  // before the callbacks of complete(): they may issue calls of their own
    changed_.notify_all();
    lock.unlock();
    work->complete(error);
  }
  work.reset();
  lock.lock();
  changed_.notify_all();
  if (interrupted) std::rethrow_exception(interrupted);
}

void WorkQueue::help(QueuedWork& work, std::chrono::milliseconds timeout) {
  // With a timeout of its own, the caller can't enter a collective that may last longer: the worker does it.
  if (timeout != kNoTimeout) return;
  std::unique_lock<std::mutex> lock(mutex_);
  while (!work.done()) {
    // Not what was issued after `work`: peers may wait for something that this thread does in between.
    if (!busy_ && !work.started_) {
      run_front(lock);
    } else {
      wait_until(lock, c10d::opTypeToString(work.retrieveOpType()).c_str(),
                 [&] { return work.done() || (!busy_ && !work.started_); });
    }
  }
}

void WorkQueue::drain() {
  std::unique_lock<std::mutex> lock(mutex_);
  while (busy_ || !queue_.empty()) {
    if (!busy_) {
      run_front(lock);
    } else {
      wait_until(lock, "a call that was issued before", [&] { return !busy_; });
    }
  }
}

void WorkQueue::close(const std::string& why) {
  std::deque<c10::intrusive_ptr<QueuedWork>> rest;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    if (!closed_) why_ = why;
    closed_ = true;
    rest.swap(queue_);
    for (auto& work : rest) work->started_ = true;
    changed_.notify_all();
  }
  for (auto& work : rest) {
    work->complete(std::make_exception_ptr(PythonPeerError(why)));
    std::lock_guard<std::mutex> lock(mutex_);
    changed_.notify_all();
  }
}

void WorkQueue::run_worker() {
  Communicator::set_background_thread(true);
  std::unique_lock<std::mutex> lock(mutex_);
  for (;;) {
    changed_.wait(lock, [&] { return closed_ || (!busy_ && !queue_.empty()); });
    if (closed_ && queue_.empty()) return;
    if (!busy_) run_front(lock);
  }
}

RingWork::RingWork(Rings& rings, std::shared_ptr<RingOp> op, int rank, c10d::OpType type, uint64_t sequence,
                   TensorLists outputs, const char* profiling_title, const std::vector<at::Tensor>* inputs)
    : Work(rank, type, sequence, std::move(outputs), profiling_title, inputs), rings_(rings), op_(std::move(op)) {}

bool RingWork::wait(std::chrono::milliseconds timeout) {
  return with_python_errors([&] {
    if (!op_->finished()) rings_.wait(op_, timeout == kNoTimeout ? Deadline{} : Deadline::after(timeout));
    if (auto error = exception()) std::rethrow_exception(error);
    return true;
  });
}

void RingWork::abort() {
  if (!op_->finished()) rings_.cancel(op_, "the operation was aborted by its own rank");
}

}  // namespace pypar
