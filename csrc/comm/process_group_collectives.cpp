// Long, because c10d has some twenty collectives and each is one short method here.
// The collectives of the process group: checks, contiguous memory, and the call of the core.
//
// Tensors are captured by value: a queued call outlives its caller. What a Flat copied is written back in the same
// body.

#include <ATen/ATen.h>

#include "comm/errors.h"
#include "comm/launch.h"
#include "comm/tensors.h"

namespace pypar {

namespace {

using Tensors = ProcessGroup::Tensors;
using c10d::OpType;

// Below this, tensors of a coalesced call travel as one.
constexpr int64_t kCoalesceBytes = 1 << 20;

const at::Tensor& only(const char* what, const Tensors& tensors) {
  if (tensors.size() != 1) {
    refuse(std::string(what) + " requires a single-element tensor list, got " + std::to_string(tensors.size()));
  }
  return tensors[0];
}

const Tensors& only_list(const char* what, const char* name, const TensorLists& lists, int world) {
  if (lists.size() != 1 || lists[0].size() != static_cast<size_t>(world)) {
    refuse(std::string(what) + ": " + name + " must be one list of " + std::to_string(world) +
           " tensors, one per rank; got " +
           (lists.size() == 1 ? std::to_string(lists[0].size()) : std::to_string(lists.size()) + " lists"));
  }
  return lists[0];
}

void check_numel(const char* what, const char* name, const at::Tensor& tensor, int64_t expected) {
  if (tensor.numel() != expected) {
    refuse(std::string(what) + ": " + name + " has " + std::to_string(tensor.numel()) + " elements (shape " +
           c10d::toString(tensor.sizes()) + "), expected " + std::to_string(expected));
  }
}

// The parts of a contiguous tensor, by their sizes in bytes.
std::vector<void*> cut(void* data, const std::vector<int64_t>& bytes) {
  std::vector<void*> parts;
  auto* at = static_cast<std::byte*>(data);
  for (int64_t n : bytes) {
    parts.push_back(at);
    at += n;
  }
  return parts;
}

// A row of tensors as the core takes them.
struct FlatList {
  explicit FlatList(const Tensors& tensors, bool read) {
    flats.reserve(tensors.size());
    for (const auto& tensor : tensors) {
      flats.emplace_back(tensor, read);
      data.push_back(flats.back().data());
      bytes.push_back(bytes_of(tensor));
    }
  }
  void write_back() {
    for (auto& flat : flats) flat.write_back();
  }
  const void* const* inputs() const { return data.data(); }
  std::vector<Flat> flats;
  std::vector<void*> data;
  std::vector<int64_t> bytes;
};

}  // namespace

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

ProcessGroup::WorkPtr ProcessGroup::allreduce(Tensors& tensors, const c10d::AllreduceOptions& options) {
  if (tensors.size() == 1 && tensors[0].layout() == at::kSparse) return allreduce_sparse(tensors, options);
  DType dtype = DType::bytes;
  ReduceOp op = ReduceOp::sum;
  const at::Tensor tensor = with_python_errors([&] {
    check_dense("all_reduce", only("all_reduce", tensors));
    op = core_op(options.reduceOp);
    auto real = as_real(tensors[0], op);
    dtype = reducible_dtype(real, op);
    return real;
  });
  return launch(OpType::ALLREDUCE, "pypar:all_reduce", options.asyncOp, options.timeout, tensors, {tensors},
                [this, tensor, dtype, op](Deadline d) {
                  Flat flat(tensor);
                  if (hosts_) {
                    hosts_->all_reduce(flat.tensor(), op, d);
                  } else {
                    communicator_->all_reduce(flat.data(), flat.data(), tensor.numel(), dtype, op, d);
                  }
                  flat.write_back();
                });
}

ProcessGroup::WorkPtr ProcessGroup::allreduce_coalesced(Tensors& tensors,
                                                        const c10d::AllreduceCoalescedOptions& options) {
  ReduceOp op = ReduceOp::sum;
  Tensors reals;
  int64_t bytes = 0;
  bool one_type = true;
  with_python_errors([&] {
    if (tensors.empty()) refuse("allreduce_coalesced requires non-empty tensor list");
    op = core_op(options.reduceOp);
    for (const auto& tensor : tensors) {
      check_dense("allreduce_coalesced", tensor);
      reals.push_back(as_real(tensor, op));
      reducible_dtype(reals.back(), op);
      one_type = one_type && reals.back().scalar_type() == reals[0].scalar_type();
      bytes += bytes_of(tensor);
    }
  });
  const bool together = one_type && reals.size() > 1 && bytes <= kCoalesceBytes;
  auto reduce_one = [this, op](at::Tensor tensor, Deadline d) {
    Flat flat(tensor);
    if (hosts_) {
      hosts_->all_reduce(flat.tensor(), op, d);
    } else {
      communicator_->all_reduce(flat.data(), flat.data(), tensor.numel(), reducible_dtype(tensor, op), op, d);
    }
    flat.write_back();
  };
  return launch(OpType::ALLREDUCE_COALESCED, "pypar:all_reduce", options.asyncOp, options.timeout, tensors, {tensors},
                [reals, together, reduce_one](Deadline d) {
                  if (!together) {
                    for (const auto& tensor : reals) reduce_one(tensor, d);
                    return;
                  }
                  at::NoGradGuard no_grad;
                  at::Tensor flat = c10d::flattenDenseTensors(reals);
                  reduce_one(flat, d);
                  int64_t begin = 0;
                  for (auto tensor : reals) {
                    tensor.copy_(flat.narrow(0, begin, tensor.numel()).view(tensor.sizes()));
                    begin += tensor.numel();
                  }
                });
}

ProcessGroup::WorkPtr ProcessGroup::reduce(Tensors& tensors, const c10d::ReduceOptions& options) {
  DType dtype = DType::bytes;
  ReduceOp op = ReduceOp::sum;
  const at::Tensor tensor = with_python_errors([&] {
    check_root("reduce", options.rootRank);
    check_dense("reduce", only("reduce", tensors));
    op = core_op(options.reduceOp);
    auto real = as_real(tensors[0], op);
    dtype = reducible_dtype(real, op);
    return real;
  });
  const auto root = static_cast<int>(options.rootRank);
  return launch(OpType::REDUCE, "pypar:reduce", options.asyncOp, options.timeout, tensors, {tensors},
                [this, tensor, dtype, op, root](Deadline d) {
                  Flat flat(tensor);
                  if (hosts_) {  // the sum everywhere, kept on the root only
                    at::Tensor sum = flat.tensor().clone();
                    hosts_->all_reduce(sum, op, d);
                    if (rank_ == root) flat.tensor().copy_(sum);
                  } else {
                    communicator_->reduce(flat.data(), rank_ == root ? flat.data() : nullptr, tensor.numel(), dtype, op,
                                          root, d);
                  }
                  if (rank_ == root) flat.write_back();
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
  if (hosts_) {
    return launch(OpType::ALLGATHER, "pypar:all_gather", options.asyncOp, options.timeout, inputs, outputs,
                  [this, outputs, inputs, options](Deadline) mutable {
                    hosts_->run_whole([&](c10d::Backend& gloo) { return gloo.allgather(outputs, inputs, options); });
                  });
  }
  return launch(OpType::ALLGATHER, "pypar:all_gather", options.asyncOp, options.timeout, inputs, outputs,
                [this, input = inputs[0], output = outputs[0]](Deadline d) {
                  Flat from(input);
                  FlatList to(output, false);
                  communicator_->all_gather(from.data(), to.bytes.data(), to.data.data(), d, movable_dtype(input));
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
  if (hosts_) {
    return launch(
        OpType::ALLGATHER_COALESCED, "pypar:all_gather", options.asyncOp, options.timeout, inputs, outputs,
        [this, outputs, inputs, options](Deadline) mutable {
          hosts_->run_whole([&](c10d::Backend& gloo) { return gloo.allgather_coalesced(outputs, inputs, options); });
        });
  }
  return launch(OpType::ALLGATHER_COALESCED, "pypar:all_gather", options.asyncOp, options.timeout, inputs, outputs,
                [this, inputs, outputs](Deadline d) {
                  for (size_t i = 0; i < inputs.size(); ++i) {
                    Tensors column;
                    for (const auto& list : outputs) column.push_back(list[i]);
                    Flat from(inputs[i]);
                    FlatList to(column, false);
                    communicator_->all_gather(from.data(), to.bytes.data(), to.data.data(), d,
                                              movable_dtype(inputs[i]));
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
  if (hosts_) {
    return launch(OpType::GATHER, "pypar:gather", options.asyncOp, options.timeout, inputs, outputs,
                  [this, outputs, inputs, options](Deadline) mutable {
                    hosts_->run_whole([&](c10d::Backend& gloo) { return gloo.gather(outputs, inputs, options); });
                  });
  }
  const auto root = static_cast<int>(options.rootRank);
  return launch(OpType::GATHER, "pypar:gather", options.asyncOp, options.timeout, inputs, outputs,
                [this, input = inputs[0], output = is_root ? outputs[0] : Tensors(), root](Deadline d) {
                  Flat from(input);
                  FlatList to(output, false);
                  communicator_->gather(from.data(), bytes_of(input), to.data.data(), root, d, movable_dtype(input));
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
  if (hosts_) {
    return launch(OpType::SCATTER, "pypar:scatter", options.asyncOp, options.timeout, outputs, {outputs},
                  [this, outputs, inputs, options](Deadline) mutable {
                    hosts_->run_whole([&](c10d::Backend& gloo) { return gloo.scatter(outputs, inputs, options); });
                  });
  }
  const auto root = static_cast<int>(options.rootRank);
  return launch(OpType::SCATTER, "pypar:scatter", options.asyncOp, options.timeout, is_root ? inputs[0] : Tensors(),
                {outputs}, [this, output = outputs[0], input = is_root ? inputs[0] : Tensors(), root](Deadline d) {
                  FlatList from(input, true);
                  Flat to(output, false);
                  communicator_->scatter(from.inputs(), bytes_of(output), to.data(), root, d, movable_dtype(output));
                  to.write_back();
                });
}

ProcessGroup::WorkPtr ProcessGroup::reduce_scatter(Tensors& outputs, TensorLists& inputs,
                                                   const c10d::ReduceScatterOptions& options) {
  ReduceOp op = ReduceOp::sum;
  Tensors reals;
  with_python_errors([&] {
    const at::Tensor& output = only("reduce_scatter", outputs);
    check_dense("reduce_scatter", output);
    op = core_op(options.reduceOp);
    for (const auto& input : only_list("reduce_scatter", "the input", inputs, size_)) {
      check_same("reduce_scatter", "an input", input, output);
      reals.push_back(as_real(input, op));
    }
    check_numel("reduce_scatter", "the output", output, inputs[0][static_cast<size_t>(rank_)].numel());
    reducible_dtype(reals[0], op);
  });
  const at::Tensor output = with_python_errors([&] { return as_real(outputs[0], op); });
  return launch(OpType::REDUCE_SCATTER, "pypar:reduce_scatter", options.asyncOp, options.timeout, inputs[0], {outputs},
                [this, reals, output, op](Deadline d) {
                  if (hosts_) {  // shards may differ in size: sum everything, keep the own
                    at::Tensor sum = c10d::flattenDenseTensors(reals);
                    hosts_->all_reduce(sum, op, d);
                    int64_t begin = 0;
                    for (int r = 0; r < rank_; ++r) begin += reals[static_cast<size_t>(r)].numel();
                    at::NoGradGuard no_grad;
                    output.copy_(sum.narrow(0, begin, output.numel()).view(output.sizes()));
                    return;
                  }
                  FlatList from(reals, true);
                  Flat to(output, false);
                  std::vector<int64_t> counts;
                  for (const auto& input : reals) counts.push_back(input.numel());
                  communicator_->reduce_scatter(from.inputs(), counts.data(), to.data(), reducible_dtype(output, op),
                                                op, d);
                  to.write_back();
                });
}

ProcessGroup::WorkPtr ProcessGroup::_reduce_scatter_base(at::Tensor& output, at::Tensor& input,
                                                         const c10d::ReduceScatterOptions& options) {
  Tensors outputs{output}, inputs{input};
  return reduce_scatter_tensor_coalesced(outputs, inputs, options);
}

ProcessGroup::WorkPtr ProcessGroup::reduce_scatter_tensor_coalesced(Tensors& outputs, Tensors& inputs,
                                                                    const c10d::ReduceScatterOptions& options) {
  ReduceOp op = ReduceOp::sum;
  Tensors froms, tos;
  with_python_errors([&] {
    constexpr const char* kWhat = "reduce_scatter_tensor";
    if (outputs.size() != inputs.size())
      refuse(std::string(kWhat) + " requires input/output tensor lists to have the same length");
    op = core_op(options.reduceOp);
    for (size_t i = 0; i < inputs.size(); ++i) {
      check_dense(kWhat, inputs[i]);
      check_same(kWhat, "the output", outputs[i], inputs[i]);
      check_numel(kWhat, "the input", inputs[i], outputs[i].numel() * size_);
      froms.push_back(as_real(inputs[i], op));
      tos.push_back(as_real(outputs[i], op));
      reducible_dtype(froms.back(), op);
    }
  });
  return launch(OpType::_REDUCE_SCATTER_BASE, "pypar:_reduce_scatter_base", options.asyncOp, options.timeout, inputs,
                {outputs}, [this, froms, tos, op](Deadline d) {
                  for (size_t i = 0; i < froms.size(); ++i) {
                    Flat from(froms[i]), to(tos[i], false);
                    if (hosts_) {
                      hosts_->reduce_scatter(to.tensor(), from.tensor(), op, d);
                    } else {
                      const std::vector<int64_t> counts(static_cast<size_t>(size_), tos[i].numel());
                      const std::vector<int64_t> bytes(static_cast<size_t>(size_), bytes_of(tos[i]));
                      const auto parts = cut(from.data(), bytes);
                      communicator_->reduce_scatter(parts.data(), counts.data(), to.data(), reducible_dtype(tos[i], op),
                                                    op, d);
                    }
                    to.write_back();
                  }
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
  if (hosts_) {
    return launch(OpType::ALLTOALL_BASE, "pypar:all_to_all", options.asyncOp, options.timeout, {input}, {{output}},
                  [this, output, input, output_splits, input_splits, options](Deadline) mutable {
                    hosts_->run_whole([&](c10d::Backend& gloo) {
                      return gloo.alltoall_base(output, input, output_splits, input_splits, options);
                    });
                  });
  }
  return launch(OpType::ALLTOALL_BASE, "pypar:all_to_all", options.asyncOp, options.timeout, {input}, {{output}},
                [this, input, output, send_bytes, recv_bytes](Deadline d) {
                  Flat from(input), to(output, false);
                  communicator_->all_to_all(cut(from.data(), send_bytes).data(), send_bytes.data(),
                                            cut(to.data(), recv_bytes).data(), recv_bytes.data(), d,
                                            movable_dtype(input));
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
  if (hosts_) {
    return launch(OpType::ALLTOALL, "pypar:all_to_all", options.asyncOp, options.timeout, inputs, {outputs},
                  [this, outputs, inputs, options](Deadline) mutable {
                    hosts_->run_whole([&](c10d::Backend& gloo) { return gloo.alltoall(outputs, inputs, options); });
                  });
  }
  return launch(OpType::ALLTOALL, "pypar:all_to_all", options.asyncOp, options.timeout, inputs, {outputs},
                [this, inputs, outputs](Deadline d) {
                  FlatList from(inputs, true), to(outputs, false);
                  communicator_->all_to_all(from.inputs(), from.bytes.data(), to.data.data(), to.bytes.data(), d,
                                            movable_dtype(inputs[0]));
                  to.write_back();
                });
}

}  // namespace pypar
