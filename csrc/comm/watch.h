// What becomes of the ranks of other hosts. Shared memory tells of the own host only; so every host keeps one line in
// the group's store (a sign of life, who left, why the group ended), which the lowest rank that is still there renews
// twice a second, and every rank reads the lines of the others, in a thread of its own.
#pragma once

#include <atomic>
#include <condition_variable>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include <torch/csrc/distributed/c10d/Store.hpp>

#include "comm/communicator.h"

namespace pypar {

class Watch : public std::enable_shared_from_this<Watch> {
 public:
  // What it needs of the connections between hosts.
  struct Links {
    std::function<void()> cut;                 // ends every wait in gloo, here and at the other end
    std::function<std::vector<int>()> closed;  // places of ranks that closed their connection
  };

  // Collective: returns when every host has written its line.
  Watch(std::shared_ptr<Communicator> local, const std::vector<std::vector<int>>& hosts, int host,
        const c10::intrusive_ptr<c10d::Store>& store);
  void start(Links links);
  // Says that this rank left, or why the group ended. Does not wait for a store that doesn't answer.
  void stop();
  // There is news: look now.
  void wake();

  // A wait for ranks of other hosts that failed with `error`: finds out what happened, ends the group on all ranks and
  // throws PeerError. `what` was waited for, until `deadline`.
  [[noreturn]] void fail(const std::string& what, const std::string& error, Deadline deadline);

  // While it lives, this rank waits in its call number `call` between hosts, which a rank that left before can't make.
  struct Call {
    Call(Watch& watch, uint64_t call) : awaited(watch.awaited_call_) { awaited = call; }
    ~Call() { awaited = 0; }
    std::atomic<uint64_t>& awaited;
  };
  // While it lives, this rank waits until the rank at `place` takes what it sends.
  struct Send {
    Send(Watch& watch, int place) : waiting(watch.sends_[static_cast<size_t>(place)]) { ++waiting; }
    ~Send() { --waiting; }
    std::atomic<int>& waiting;
  };

 private:
  struct Host {
    std::string key;
    std::vector<int> ranks;
    std::string beat;
    int silent_polls = 0;
  };
  void run();
  bool poll(bool tick);
  void look_around(bool lowest, bool tick);
  void hear(Host& host, const std::string& line, bool count);
  void store_is_lost();
  std::vector<int> dead_places();
  void publish();
  std::string line() const;
  int place_of(int rank) const;
  std::string whom(const std::vector<int>& places) const;

  const std::shared_ptr<Communicator> local_;
  const c10::intrusive_ptr<c10d::Store> store_;
  std::string own_key_;
  std::vector<Host> others_;
  std::vector<std::string> other_keys_;
  int lost_polls_ = 0;
  uint64_t num_ticks_ = 0;
  Links links_;
  std::atomic<uint64_t> awaited_call_{0};
  std::vector<std::atomic<int>> sends_;  // by place

  std::mutex mutex_;
  std::condition_variable changed_;
  int urgent_ = 0;                         // threads that wait for a verdict
  std::map<int, uint64_t> left_since_ns_;  // by place: when this rank heard of it
  bool woken_ = false, stop_ = false, over_ = false;
  std::thread thread_;
};

}  // namespace pypar
