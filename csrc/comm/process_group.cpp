#include "comm/process_group.h"

#include <ATen/ATen.h>

#include "comm/errors.h"
#include "comm/launch.h"
#include "comm/registry.h"
#include "comm/tensors.h"
#include "pypar/signal.h"

namespace pypar {

ProcessGroup::ProcessGroup(c10::intrusive_ptr<c10d::Store> store, int rank, int size,
                           c10::intrusive_ptr<Options> options)
    : c10d::Backend(rank, size), store_(std::move(store)), options_(std::move(options)) {
  with_python_errors([&] {
    auto mesh = Mesh::connect(options_->group_name, rank, size, key_value_of(store_), &Communicator::segment_bytes,
                              static_cast<uint64_t>(options_->timeout.count()));
    partition_ = mesh->hosts;
    communicator_ = std::make_shared<Communicator>(std::move(mesh));
    rings_ = std::make_unique<Rings>(*communicator_);
    if (partition_.size() > 1) {
      hosts_ = std::make_shared<Hosts>(communicator_, partition_, store_, rank, size, options_->timeout);
      messages_ = std::make_unique<Messages>(*communicator_, *rings_, hosts_->whole(), hosts_->watch());
    }
  });
  communicator_->set_timeout(options_->timeout);
  communicator_->set_flush([this] { queue_.drain(); });
  if (hosts_) hosts_->set_turn([this](const std::function<void()>& call) { take_turn(call); });
  setGroupUid(options_->group_name);
  init();
}

ProcessGroup::~ProcessGroup() {
  const WithoutGil no_gil;  // the worker may be in a callback that wants it
  communicator_->set_flush(nullptr);
  if (hosts_) hosts_->set_turn(nullptr);
  if (!closed_ && !queue_.try_enter()) {
    communicator_->abort(communicator_->rank_text(communicator_->rank()) + " of group '" + options_->group_name +
                         "' dropped the group while its calls were pending; did it raise an exception?");
  }
  if (hosts_) hosts_->stop();  // after this, nothing waits for another host
  queue_.close("the process group was destroyed");
  messages_.reset();
}

void ProcessGroup::setGroupUid(const std::string& name) {
  c10d::Backend::setGroupUid(name);
  if (name == registered_name_) return;
  registered_name_ = name;
  register_communicator(name, communicator_, hosts_);
}

c10::intrusive_ptr<c10d::Backend> ProcessGroup::split(const c10::intrusive_ptr<c10d::Store>& store,
                                                      const std::vector<int>& ranks,
                                                      const c10::intrusive_ptr<c10d::Backend::Options>& options) {
  const auto place = std::find(ranks.begin(), ranks.end(), rank_);
  if (place == ranks.end()) return nullptr;
  auto own = c10::make_intrusive<Options>(options ? options->timeout : options_->timeout);
  own->group_name = options && !options->group_name.empty() ? options->group_name : options_->group_name + ":split";
  return c10::make_intrusive<ProcessGroup>(store->clone(), static_cast<int>(place - ranks.begin()),
                                           static_cast<int>(ranks.size()), own);
}

c10d::ErrorType ProcessGroup::getError() {
  return communicator_->aborted() ? c10d::ErrorType::COMM_ERROR : c10d::ErrorType::SUCCESS;
}

void ProcessGroup::abort() {
  const std::string why = "rank " + std::to_string(rank_) + " aborted group '" + options_->group_name + "'";
  communicator_->abort(why);
  rings_->fail_all(why);
  if (hosts_) hosts_->watch()->wake();
}

void ProcessGroup::shutdown() {
  if (closed_) return;
  if (communicator_->in_handler()) return abort();  // called by a handler that interrupts a call of this group
  with_python_errors([&] { queue_.drain(); });
  closed_ = true;
  const std::string why = "group '" + options_->group_name + "' was destroyed";
  queue_.close(why);
  rings_->fail_all(why);
  if (hosts_) {
    hosts_->stop();
  } else {
    communicator_->leave();
  }
}

Deadline ProcessGroup::deadline(Milliseconds timeout) const {
  return Deadline::after(timeout == c10d::kUnsetTimeout ? options_->timeout : timeout);
}

void ProcessGroup::check_open() const {
  if (closed_) {
    throw PythonPeerError("rank " + std::to_string(rank_) + ": group '" + options_->group_name + "' was destroyed");
  }
  with_python_errors([&] { communicator_->refuse_in_handler(); });
}

void ProcessGroup::take_turn(const std::function<void()>& call) {
  check_open();
  do {
    queue_.drain();
  } while (!queue_.try_enter());
  struct Leave {
    WorkQueue& queue;
    ~Leave() { queue.leave(); }
  } leave{queue_};
  call();
}

void ProcessGroup::check_root(const char* what, int64_t root) const {
  if (root < 0 || root >= size_) {
    refuse(std::string(what) + ": invalid root rank: " + std::to_string(root) + "; the group has " +
           std::to_string(size_) + " ranks");
  }
}

ProcessGroup::WorkPtr ProcessGroup::barrier(const c10d::BarrierOptions& options) {
  return launch(c10d::OpType::BARRIER, "pypar:barrier", options.asyncOp, options.timeout, {}, {}, [this](Deadline d) {
    if (hosts_) {
      hosts_->barrier(d);
    } else {
      communicator_->barrier(d);
    }
  });
}

namespace {

// Monitored barriers use tags below zero, which users' messages can't have.
struct Answer {
  int64_t ok;
};

}  // namespace

void ProcessGroup::monitoredBarrier(const c10d::BarrierOptions& options, bool wait_all_ranks) {
  if (hosts_) return hosts_->whole()->monitoredBarrier(options, wait_all_ranks);
  check_open();
  const int64_t tag = -1 - num_monitored_barriers_++;
  const auto timeout = options.timeout == c10d::kUnsetTimeout ? options_->timeout : options.timeout;
  with_python_errors([&] { barrier_arrive(timeout, wait_all_ranks, tag); });
}

// Every rank tells rank 0 that it is there, and waits for its answer. Only rank 0 has a deadline of its own, so that
// the one that times out is the one that knows who is missing. A failed monitored barrier does not end the group.
void ProcessGroup::barrier_arrive(Milliseconds timeout, bool wait_all_ranks, int64_t tag) {
  // The operation keeps its memory: one that was posted outlives a barrier that ends early with an error.
  auto message = [&](bool is_send, int peer, const std::shared_ptr<Answer>& answer, Deadline until) {
    auto op = std::make_shared<RingOp>();
    op->is_send = is_send;
    op->peer = peer;
    op->tag = tag;
    op->data = reinterpret_cast<std::byte*>(answer.get());
    op->bytes = sizeof *answer;
    op->deadline = until;
    op->on_done = [answer](std::exception_ptr) {
    };
    rings_->post(op);
    return op;
  };
  if (rank_ != 0) {
    const auto here = std::make_shared<Answer>(Answer{1}), answer = std::make_shared<Answer>(Answer{0});
    std::string why = "rank 0 reported ranks that did not come";
    try {
      rings_->wait(message(true, 0, here, deadline(c10d::kUnsetTimeout)));
      rings_->wait(message(false, 0, answer, deadline(c10d::kUnsetTimeout)));
    } catch (const PeerError& error) {
      why = error.what();
    }
    if (answer->ok == 1) return;
    throw PeerError("Rank " + std::to_string(rank_) +
                    " successfully reached monitoredBarrier, but received errors while waiting for send/recv from rank "
                    "0. Please check rank 0 logs for faulty rank.\n Original exception: \n" +
                    why);
  }
  const auto until =
      Deadline{now_ns() + static_cast<uint64_t>(timeout.count()) * 1'000'000, static_cast<uint64_t>(timeout.count())};
  const std::string in_time = " failed to pass monitoredBarrier in " + std::to_string(timeout.count()) + " ms";
  std::vector<std::shared_ptr<RingOp>> ops(static_cast<size_t>(size_));
  for (int r = 1; r < size_; ++r) ops[static_cast<size_t>(r)] = message(false, r, std::make_shared<Answer>(), {});
  std::vector<int> missing;
  std::string error;
  bool timed_out_first = timeout.count() <= 0;
  for (int r = 1; r < size_ && !timed_out_first; ++r) {
    auto& op = ops[static_cast<size_t>(r)];
    // The original deadline for all: a rank that came in time is not missing because an earlier one did not.
    if (rings_->wait_until(op, until) && !op->error) continue;
    missing.push_back(r);
    if (!wait_all_ranks) break;
  }
  for (int r = 1; r < size_; ++r) {
    auto& op = ops[static_cast<size_t>(r)];
    if (!op->finished()) rings_->cancel(op, "monitoredBarrier is over");
  }
  if (timed_out_first) {
    error = "Rank 0 timed out in monitoredBarrier after " + std::to_string(timeout.count()) +
            " ms. No ranks successfully processed in monitoredBarrier.";
  } else if (!missing.empty()) {
    std::string names;
    for (int r : missing) names += (names.empty() ? "" : ", ") + std::to_string(r);
    error = (wait_all_ranks ? "[Rank 0]: Ranks " : "[Rank 0]: Rank ") + names + in_time;
  }
  auto answer = std::make_shared<Answer>(Answer{error.empty() ? 1 : 0});
  for (int r = 1; r < size_ && !communicator_->aborted(); ++r) {  // also to those that did not come: they will
    if (rings_->try_send(r, tag, answer.get(), sizeof *answer, DType::bytes)) continue;
    message(true, r, answer, {});
  }
  if (!error.empty()) throw PeerError(error);
}

}  // namespace pypar
