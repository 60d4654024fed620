// Messages between ranks of different hosts, through gloo.
//
// A message is a header, which every rank listens for from anybody, and a payload, which stays with its sender until a
// receive matches the header (a small one rides in it). So all receives are matched in one place, Rings, and a receive
// from any rank takes whichever comes first, from this host or another.
#pragma once

#include <memory>
#include <mutex>
#include <thread>

#include <torch/csrc/distributed/c10d/Backend.hpp>

#include "comm/rings.h"
#include "comm/watch.h"
#include "comm/work.h"

namespace pypar {

class Messages {
 public:
  // `gloo`: over all ranks of the group.
  Messages(Communicator& local, Rings& rings, c10::intrusive_ptr<c10d::Backend> gloo, std::shared_ptr<Watch> watch);
  ~Messages();

  // To the rank at `place`; `flat` is contiguous.
  c10::intrusive_ptr<c10d::Work> send(const at::Tensor& flat, int place, int64_t tag, uint64_t sequence,
                                      const std::vector<at::Tensor>& tensors);
  // Receives may match messages of other hosts from now on.
  void listen();

 private:
  using WorkPtr = c10::intrusive_ptr<c10d::Work>;

  void run();
  void fetch(std::byte* to, int rank, int tag, size_t bytes);

  Communicator& local_;
  Rings& rings_;
  const c10::intrusive_ptr<c10d::Backend> gloo_;
  const std::shared_ptr<Watch> watch_;
  std::mutex mutex_;
  int next_payload_ = 0;
  bool stop_ = false;
  WorkPtr listening_;
  std::thread thread_;
};

// A send to another host. It is complete when somebody waited for it.
class RemoteSend : public Work {
 public:
  template <typename... Args>
  RemoteSend(std::vector<c10::intrusive_ptr<c10d::Work>> parts, at::Tensor kept, int place, std::string text,
             Deadline deadline, std::shared_ptr<Watch> watch, Args&&... args)
      : Work(std::forward<Args>(args)...),
        parts_(std::move(parts)),
        kept_(std::move(kept)),
        place_(place),
        text_(std::move(text)),
        deadline_(deadline),
        watch_(std::move(watch)) {}
  bool wait(std::chrono::milliseconds timeout) override;

 private:
  std::mutex waiting_;
  std::vector<c10::intrusive_ptr<c10d::Work>> parts_;
  at::Tensor kept_;
  const int place_;
  const std::string text_;
  const Deadline deadline_;
  const std::shared_ptr<Watch> watch_;
};

}  // namespace pypar
