// The collectives of the process group that add up: checks, contiguous memory, and the call of the core.
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

namespace {

// Below this, tensors of a coalesced call travel as one.
constexpr int64_t kCoalesceBytes = 1 << 20;

}  // namespace

ProcessGroup::WorkPtr ProcessGroup::allreduce(Tensors& tensors, const c10d::AllreduceOptions& options) {
  if (tensors.size() == 1 && tensors[0].layout() == at::kSparse) return allreduce_sparse(tensors, options);
  DType dtype = DType::bytes;
  ReduceOp op = ReduceOp::sum;
  const at::Tensor tensor = with_python_errors([&] {
    check_dense("all_reduce", only("all_reduce", tensors));
    op = core_op(options.reduceOp);
    auto real = as_real(tensors[0], options.reduceOp);
    dtype = reducible_dtype(real, op);
    return real;
  });
  return launch(OpType::ALLREDUCE, "pypar:all_reduce", options.asyncOp, options.timeout, tensors, {tensors},
                [this, tensor, dtype, op, asked = options.reduceOp](Deadline d) {
                  Flat flat(tensor, asked);
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
      reals.push_back(as_real(tensor, options.reduceOp));
      reducible_dtype(reals.back(), op);
      one_type = one_type && reals.back().scalar_type() == reals[0].scalar_type();
      bytes += bytes_of(tensor);
    }
  });
  const bool together = one_type && reals.size() > 1 && bytes <= kCoalesceBytes;
  auto reduce_one = [this, op, asked = options.reduceOp](at::Tensor tensor, Deadline d) {
    Flat flat(tensor, asked);
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
    auto real = as_real(tensors[0], options.reduceOp);
    dtype = reducible_dtype(real, op);
    return real;
  });
  const auto root = static_cast<int>(options.rootRank);
  return launch(OpType::REDUCE, "pypar:reduce", options.asyncOp, options.timeout, tensors, {tensors},
                [this, tensor, dtype, op, root, asked = options.reduceOp](Deadline d) {
                  Flat flat(tensor, asked);
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
      reals.push_back(as_real(input, options.reduceOp));
    }
    check_numel("reduce_scatter", "the output", output, inputs[0][static_cast<size_t>(rank_)].numel());
    reducible_dtype(reals[0], op);
  });
  const at::Tensor output = with_python_errors([&] { return as_real(outputs[0], options.reduceOp); });
  return launch(OpType::REDUCE_SCATTER, "pypar:reduce_scatter", options.asyncOp, options.timeout, inputs[0], {outputs},
                [this, reals, output, op, asked = options.reduceOp](Deadline d) {
                  FlatList from(reals, asked);
                  Flat to(output, false);
                  std::vector<int64_t> counts;
                  for (const auto& input : reals) counts.push_back(input.numel());
                  if (hosts_) {
                    Tensors rows;
                    for (auto& flat : from.flats) rows.push_back(flat.tensor());
                    hosts_->reduce_scatter(to.tensor(), c10d::flattenDenseTensors(rows), counts, op, d);
                  } else {
                    communicator_->reduce_scatter(from.inputs(), counts.data(), to.data(), reducible_dtype(output, op),
                                                  op, d);
                  }
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
      froms.push_back(as_real(inputs[i], options.reduceOp));
      tos.push_back(as_real(outputs[i], options.reduceOp));
      reducible_dtype(froms.back(), op);
    }
  });
  return launch(OpType::_REDUCE_SCATTER_BASE, "pypar:_reduce_scatter_base", options.asyncOp, options.timeout, inputs,
                {outputs}, [this, froms, tos, op, asked = options.reduceOp](Deadline d) {
                  for (size_t i = 0; i < froms.size(); ++i) {
                    Flat from(froms[i], asked), to(tos[i], false);
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

}  // namespace pypar
