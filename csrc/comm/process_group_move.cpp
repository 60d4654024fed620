// The collectives of the process group that move bytes: checks, contiguous memory, and the call of the core.
//
// Tensors are captured by value: a queued call outlives its caller. What a Flat copied is written back in the same
// body.

#include <ATen/ATen.h>

#include "comm/collective_arguments.h"
#include "comm/errors.h"
#include "comm/launch.h"
#include "comm/tensors.h"

namespace pypar {

using c10d::OpType;

void ProcessGroup::gather_all(const void* in, const std::vector<int64_t>& bytes, void* const* outs, Deadline deadline,
                              DType dtype) {
  if (hosts_) {
    hosts_->all_gather(in, bytes, outs, deadline);
  } else {
    communicator_->all_gather(in, bytes.data(), outs, deadline, dtype);
  }
}

void ProcessGroup::swap_all(const void* const* ins, const std::vector<int64_t>& send_bytes, void* const* outs,
                            const std::vector<int64_t>& recv_bytes, Deadline deadline, DType dtype) {
  if (hosts_) {
    hosts_->all_to_all(ins, send_bytes, outs, recv_bytes, deadline);
  } else {
    communicator_->all_to_all(ins, send_bytes.data(), outs, recv_bytes.data(), deadline, dtype);
  }
}

ProcessGroup::WorkPtr ProcessGroup::broadcast(Tensors& tensors, const c10d::BroadcastOptions& options) {
  const at::Tensor tensor = with_python_errors([&] {
    check_root("broadcast", options.rootRank);
    check_dense("broadcast", only("broadcast", tensors));
    return tensors[0];
  });
  const auto root = static_cast<int>(options.rootRank);
  return launch(OpType::BROADCAST, "pypar:broadcast", options.asyncOp, options.timeout, tensors, {tensors},
                [this, tensor, root](Deadline d) {
                  Flat flat(tensor, rank_ == root);
                  if (hosts_) {
                    hosts_->broadcast(flat.tensor(), root, d);
                  } else {
                    communicator_->broadcast(flat.data(), bytes_of(tensor), root, d, movable_dtype(tensor));
                  }
                  if (rank_ != root) flat.write_back();
                });
}

ProcessGroup::WorkPtr ProcessGroup::allgather(TensorLists& outputs, Tensors& inputs,
                                              const c10d::AllgatherOptions& options) {
  with_python_errors([&] {
    const at::Tensor& input = only("all_gather", inputs);
    check_dense("all_gather", input);
    only_list("all_gather", "the output", outputs, size_);
    for (const auto& output : outputs[0]) check_same("all_gather", "an output", output, input);
    check_numel("all_gather", "the own output", outputs[0][static_cast<size_t>(rank_)], input.numel());
  });
  return launch(OpType::ALLGATHER, "pypar:all_gather", options.asyncOp, options.timeout, inputs, outputs,
                [this, input = inputs[0], output = outputs[0]](Deadline d) {
                  Flat from(input);
                  FlatList to(output, false);
                  gather_all(from.data(), to.bytes, to.data.data(), d, movable_dtype(input));
                  to.write_back();
                });
}

ProcessGroup::WorkPtr ProcessGroup::_allgather_base(at::Tensor& output, at::Tensor& input,
                                                    const c10d::AllgatherOptions& options) {
  Tensors outputs{output}, inputs{input};
  return allgather_into_tensor_coalesced(outputs, inputs, options);
}

ProcessGroup::WorkPtr ProcessGroup::allgather_into_tensor_coalesced(Tensors& outputs, Tensors& inputs,
                                                                    const c10d::AllgatherOptions& options) {
  with_python_errors([&] {
    constexpr const char* kWhat = "all_gather_into_tensor";
    if (outputs.size() != inputs.size())
      refuse(std::string(kWhat) + " requires input/output tensor lists to have the same length");
    for (size_t i = 0; i < inputs.size(); ++i) {
      check_dense(kWhat, inputs[i]);
      check_same(kWhat, "the output", outputs[i], inputs[i]);
      check_numel(kWhat, "the output", outputs[i], inputs[i].numel() * size_);
    }
  });
  return launch(OpType::_ALLGATHER_BASE, "pypar:_all_gather_base", options.asyncOp, options.timeout, inputs, {outputs},
                [this, inputs, outputs](Deadline d) {
                  for (size_t i = 0; i < inputs.size(); ++i) {
                    Flat from(inputs[i]), to(outputs[i], false);
                    if (hosts_) {
                      hosts_->all_gather(to.tensor(), from.tensor(), d);
                    } else {
                      const std::vector<int64_t> bytes(static_cast<size_t>(size_), bytes_of(inputs[i]));
                      communicator_->all_gather(from.data(), bytes.data(), cut(to.data(), bytes).data(), d,
                                                movable_dtype(inputs[i]));
                    }
                    to.write_back();
                  }
                });
}

ProcessGroup::WorkPtr ProcessGroup::allgather_coalesced(TensorLists& outputs, Tensors& inputs,
                                                        const c10d::AllgatherOptions& options) {
  with_python_errors([&] {
    constexpr const char* kWhat = "all_gather_coalesced";
    if (inputs.empty()) refuse(std::string(kWhat) + " requires non-empty input tensor list");
    if (outputs.size() != static_cast<size_t>(size_))
      refuse(std::string(kWhat) + ": output lists should be equal to world size");
    for (const auto& list : outputs) {
      if (list.size() != inputs.size()) {
        refuse(std::string(kWhat) + ": invalid output size: (expected length " + std::to_string(inputs.size()) +
               ", got " + std::to_string(list.size()) + ")");
      }
      for (size_t i = 0; i < inputs.size(); ++i) check_same(kWhat, "an output", list[i], inputs[i]);
    }
    for (size_t i = 0; i < inputs.size(); ++i) {
      check_numel(kWhat, "the own output", outputs[static_cast<size_t>(rank_)][i], inputs[i].numel());
    }
  });
  return launch(OpType::ALLGATHER_COALESCED, "pypar:all_gather", options.asyncOp, options.timeout, inputs, outputs,
                [this, inputs, outputs](Deadline d) {
                  for (size_t i = 0; i < inputs.size(); ++i) {
                    Tensors column;
                    for (const auto& list : outputs) column.push_back(list[i]);
                    Flat from(inputs[i]);
                    FlatList to(column, false);
                    gather_all(from.data(), to.bytes, to.data.data(), d, movable_dtype(inputs[i]));
                    to.write_back();
                  }
                });
}

ProcessGroup::WorkPtr ProcessGroup::gather(TensorLists& outputs, Tensors& inputs, const c10d::GatherOptions& options) {
  const bool is_root = rank_ == options.rootRank;
  with_python_errors([&] {
    check_root("gather", options.rootRank);
    const at::Tensor& input = only("gather", inputs);
    check_dense("gather", input);
    if (!is_root && !outputs.empty()) refuse("gather requires empty output on non-root");
    if (is_root) {
      for (const auto& output : only_list("gather", "the output", outputs, size_)) {
        check_same("gather", "an output", output, input);
        check_numel("gather", "an output", output, input.numel());
      }
    }
  });
  const auto root = static_cast<int>(options.rootRank);
  return launch(OpType::GATHER, "pypar:gather", options.asyncOp, options.timeout, inputs, outputs,
                [this, input = inputs[0], output = is_root ? outputs[0] : Tensors(), root](Deadline d) {
                  Flat from(input);
                  FlatList to(output, false);
                  if (hosts_) {
                    const auto world = static_cast<size_t>(size_);
                    std::vector<int64_t> send(world, 0);
                    send[static_cast<size_t>(root)] = bytes_of(input);
                    to.bytes.resize(world, 0);
                    to.data.resize(world, nullptr);
                    const std::vector<const void*> ins(world, from.data());
                    hosts_->all_to_all(ins.data(), send, to.data.data(), to.bytes, d);
                  } else {
                    communicator_->gather(from.data(), bytes_of(input), to.data.data(), root, d, movable_dtype(input));
                  }
                  to.write_back();
                });
}

ProcessGroup::WorkPtr ProcessGroup::scatter(Tensors& outputs, TensorLists& inputs,
                                            const c10d::ScatterOptions& options) {
  const bool is_root = rank_ == options.rootRank;
  with_python_errors([&] {
    check_root("scatter", options.rootRank);
    const at::Tensor& output = only("scatter", outputs);
    check_dense("scatter", output);
    if (!is_root && !inputs.empty()) refuse("scatter requires empty input on non-root");
    if (is_root) {
      for (const auto& input : only_list("scatter", "the input", inputs, size_)) {
        check_same("scatter", "an input", input, output);
        check_numel("scatter", "an input", input, output.numel());
      }
    }
  });
  const auto root = static_cast<int>(options.rootRank);
  return launch(OpType::SCATTER, "pypar:scatter", options.asyncOp, options.timeout, is_root ? inputs[0] : Tensors(),
                {outputs}, [this, output = outputs[0], input = is_root ? inputs[0] : Tensors(), root](Deadline d) {
                  FlatList from(input, true);
                  Flat to(output, false);
                  if (hosts_) {
                    const auto world = static_cast<size_t>(size_);
                    std::vector<int64_t> recv(world, 0);
                    recv[static_cast<size_t>(root)] = bytes_of(output);
                    from.bytes.resize(world, 0);
                    from.data.resize(world, nullptr);
                    const std::vector<void*> outs(world, to.data());
                    hosts_->all_to_all(from.inputs(), from.bytes, outs.data(), recv, d);
                  } else {
                    communicator_->scatter(from.inputs(), bytes_of(output), to.data(), root, d, movable_dtype(output));
                  }
                  to.write_back();
                });
}

ProcessGroup::WorkPtr ProcessGroup::alltoall_base(at::Tensor& output, at::Tensor& input,
                                                  std::vector<int64_t>& output_splits,
                                                  std::vector<int64_t>& input_splits,
                                                  const c10d::AllToAllOptions& options) {
  auto bytes = [this](const char* name, const at::Tensor& tensor, const std::vector<int64_t>& splits) {
    constexpr const char* kWhat = "all_to_all_single";
    const int64_t rows = tensor.dim() == 0 ? 1 : tensor.size(0);
    const int64_t row = rows == 0 ? 0 : bytes_of(tensor) / rows;
    if (splits.empty()) {
      if (rows % size_ != 0) {
        refuse(std::string(kWhat) + ": dim 0 of the " + name + " (" + std::to_string(rows) +
               ") does not divide equally across group size " + std::to_string(size_) + "; give split sizes");
      }
      return std::vector<int64_t>(static_cast<size_t>(size_), rows / size_ * row);
    }
    std::vector<int64_t> result;
    int64_t total = 0;
    for (int64_t n : splits) {
      result.push_back(n * row);
      total += n;
    }
    if (splits.size() != static_cast<size_t>(size_) || total != rows) {
      refuse(std::string(kWhat) + ": split sizes of the " + name + " must be " + std::to_string(size_) +
             " numbers that add up to dim 0 (" + std::to_string(rows) + "); got " + c10d::toString(splits));
    }
    return result;
  };
  std::vector<int64_t> send_bytes, recv_bytes;
  with_python_errors([&] {
    check_dense("all_to_all_single", input);
    check_same("all_to_all_single", "the output", output, input);
    send_bytes = bytes("input", input, input_splits);
    recv_bytes = bytes("output", output, output_splits);
  });
  return launch(OpType::ALLTOALL_BASE, "pypar:all_to_all", options.asyncOp, options.timeout, {input}, {{output}},
                [this, input, output, send_bytes, recv_bytes](Deadline d) {
                  Flat from(input), to(output, false);
                  swap_all(cut(from.data(), send_bytes).data(), send_bytes, cut(to.data(), recv_bytes).data(),
                           recv_bytes, d, movable_dtype(input));
                  to.write_back();
                });
}

ProcessGroup::WorkPtr ProcessGroup::alltoall(Tensors& outputs, Tensors& inputs, const c10d::AllToAllOptions& options) {
  with_python_errors([&] {
    auto check = [this](const char* name, size_t num) {
      if (num != static_cast<size_t>(size_)) {
        refuse(std::string("all_to_all: ") + name + " tensor list size " + std::to_string(num) +
               " does not match world size " + std::to_string(size_));
      }
    };
    check("input", inputs.size());
    check("output", outputs.size());
    for (const auto& tensor : inputs) check_same("all_to_all", "an input", tensor, inputs[0]);
    for (const auto& tensor : outputs) check_same("all_to_all", "an output", tensor, inputs[0]);
  });
  return launch(OpType::ALLTOALL, "pypar:all_to_all", options.asyncOp, options.timeout, inputs, {outputs},
                [this, inputs, outputs](Deadline d) {
                  FlatList from(inputs, true), to(outputs, false);
                  swap_all(from.inputs(), from.bytes, to.data.data(), to.bytes, d, movable_dtype(inputs[0]));
                  to.write_back();
                });
}

}  // namespace pypar
