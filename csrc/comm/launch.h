// ProcessGroup::launch, for the files that implement it. Internal to comm/.
#pragma once

#include "comm/errors.h"
#include "comm/process_group.h"

namespace pypar {

template <typename Run>
ProcessGroup::WorkPtr ProcessGroup::launch(c10d::OpType type, const char* title, bool async, Milliseconds timeout,
                                           const Tensors& inputs, TensorLists outputs, Run&& run) {
  check_open();
  const uint64_t sequence = ++sequence_;
  if (!async && queue_.try_enter()) {
    struct Leave {
      WorkQueue& queue;
      ~Leave() { queue.leave(); }
    } leave{queue_};
    auto work = c10::make_intrusive<Work>(rank_, type, sequence, std::move(outputs), title, &inputs);
    with_python_errors([&] { run(deadline(timeout)); });
    work->complete();
    return work;
  }
  auto body = [this, timeout, run = std::forward<Run>(run)]() mutable {
    run(deadline(timeout));
  };
  auto work = c10::make_intrusive<QueuedWork>(queue_, std::move(body), rank_, type, sequence, std::move(outputs), title,
                                              &inputs);
  queue_.push(work);
  if (!async) work->wait(kNoTimeout);
  return work;
}

}  // namespace pypar
