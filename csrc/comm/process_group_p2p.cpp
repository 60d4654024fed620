// send and recv of the process group: through the rings, or through gloo to ranks of other hosts.

#include <ATen/ATen.h>

#include "comm/errors.h"
#include "comm/launch.h"
#include "comm/tensors.h"

namespace pypar {

namespace {

const at::Tensor& check_message(const char* what, const std::vector<at::Tensor>& tensors, int peer, int rank, int size,
                                int tag) {
  if (tensors.size() != 1) refuse(std::string(what) + " takes one tensor, got " + std::to_string(tensors.size()));
  check_dense(what, tensors[0]);
  if (tag < 0) refuse(std::string(what) + ": Tag must be nonnegative, got " + std::to_string(tag));
  if (peer != kAnySource && (peer < 0 || peer >= size)) {
    refuse(std::string(what) + ": rank " + std::to_string(peer) + " is not in the group of " + std::to_string(size));
  }
  if (peer == rank)
    refuse(std::string(what) + ": rank " + std::to_string(rank) + " can't exchange messages with itself");
  return tensors[0];
}

std::shared_ptr<RingOp> make_op(bool is_send, int peer, int tag, at::Tensor& flat, Deadline deadline) {
  auto op = std::make_shared<RingOp>();
  op->is_send = is_send;
  op->peer = peer;
  op->tag = tag;
  op->data = static_cast<std::byte*>(flat.data_ptr());
  op->bytes = flat.nbytes();
  op->dtype = movable_dtype(flat);
  op->deadline = deadline;
  return op;
}

std::exception_ptr python_error(const std::exception_ptr& error) {
  return error ? for_python(error) : nullptr;
}

}  // namespace

int ProcessGroup::place_of(int rank) const {
  int place = hosts_ ? 0 : rank;
  while (communicator_->group_rank(place) != rank) ++place;
  return place;
}

ProcessGroup::WorkPtr ProcessGroup::send(Tensors& tensors, int dst, int tag) {
  check_open();
  return with_python_errors([&]() -> WorkPtr {
    const at::Tensor& tensor = check_message("send", tensors, dst, rank_, size_, tag);
    if (dst == kAnySource) refuse("send: -1 is not a rank");
    const uint64_t sequence = ++num_messages_;
    const int place = place_of(dst);
    Flat flat(tensor);
    if (place >= communicator_->world()) return messages_->send(flat.tensor(), place, tag, sequence, tensors);
    if (rings_->try_send(place, tag, flat.data(), flat.tensor().nbytes(), movable_dtype(tensor))) {
      auto work =
          c10::make_intrusive<Work>(rank_, c10d::OpType::SEND, sequence, TensorLists{tensors}, "pypar:send", &tensors);
      work->complete();
      return work;
    }
    auto op = make_op(true, place, tag, flat.tensor(), deadline(c10d::kUnsetTimeout));
    auto work = c10::make_intrusive<RingWork>(*rings_, op, rank_, c10d::OpType::SEND, sequence, TensorLists{tensors},
                                              "pypar:send", &tensors);
    op->on_done = [work, kept = flat.tensor()](std::exception_ptr error) {
      work->complete(python_error(error));
    };
    rings_->post(op);
    return work;
  });
}

ProcessGroup::WorkPtr ProcessGroup::launch_recv(Tensors& tensors, int src, int tag) {
  check_open();
  const char* title = src == kAnySource ? "pypar:recvAnySource" : "pypar:recv";
  const auto type = src == kAnySource ? c10d::OpType::RECVANYSOURCE : c10d::OpType::RECV;
  return with_python_errors([&]() -> WorkPtr {
    const at::Tensor& tensor = check_message("recv", tensors, src, rank_, size_, tag);
    const uint64_t sequence = ++num_messages_;
    const int place = src == kAnySource ? src : place_of(src);
    if (hosts_ && (place == kAnySource || place >= communicator_->world())) messages_->listen();
    auto flat = std::make_unique<Flat>(tensor, false);
    int source = kAnySource;
    if (rings_->try_recv(place, tag, flat->data(), flat->tensor().nbytes(), movable_dtype(tensor), &source)) {
      flat->write_back();
      auto work = c10::make_intrusive<ReceivedWork>(communicator_->group_rank(source), rank_, type, sequence,
                                                    TensorLists{tensors}, title, &tensors);
      work->complete();
      return work;
    }
    auto op = make_op(false, place, tag, flat->tensor(), deadline(c10d::kUnsetTimeout));
    auto work =
        c10::make_intrusive<RingWork>(*rings_, op, rank_, type, sequence, TensorLists{tensors}, title, &tensors);
    op->on_done = [work, original = tensor, received = flat->tensor()](std::exception_ptr error) {
      if (!error && !received.is_same(original)) {
        at::NoGradGuard no_grad;
        original.copy_(received);
      }
      work->complete(python_error(error));
    };
    rings_->post(op);
    return work;
  });
}

ProcessGroup::WorkPtr ProcessGroup::recv(Tensors& tensors, int src, int tag) {
  if (src == kAnySource)
    with_python_errors([] { refuse("recv: -1 is not a rank; use recv without src for any source"); });
  return launch_recv(tensors, src, tag);
}

ProcessGroup::WorkPtr ProcessGroup::recvAnysource(Tensors& tensors, int tag) {
  return launch_recv(tensors, kAnySource, tag);
}

}  // namespace pypar
