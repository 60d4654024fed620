#include <torch/library.h>

#include "cpu/layout.h"

namespace pypar {

namespace {

void all_reduce_into(const at::Tensor& in, at::Tensor& out, std::string_view op, const std::string& group_name) {
  const auto communicator = find_communicator(group_name);
  if (communicator == nullptr) {  // ranks on several hosts: the process group's own transport
    if (!out.is_same(in)) out.copy_(in);
    std::vector<at::Tensor> tensors{out};
    c10d::AllreduceOptions options;
    options.reduceOp = c10d_reduce_op_of(op);
    process_group_of(group_name)->allreduce(tensors, options)->wait();
    return;
  }
  communicator->all_reduce(in.const_data_ptr(), out.mutable_data_ptr(), in.numel(), dtype_of(in), reduce_op_of(op),
                           communicator->default_deadline());
}

at::Tensor all_reduce(const at::Tensor& x, c10::string_view op, c10::string_view group_name) {
  return with_python_errors([&] {
    check_cpu_tensor("all_reduce", "x", x);
    const at::Tensor in = x.contiguous();
    at::Tensor out = at::empty_like(in);
    all_reduce_into(in, out, op, std::string(group_name));
    return out;
  });
}

void all_reduce_(at::Tensor& x, c10::string_view op, c10::string_view group_name) {
  with_python_errors([&] {
    check_cpu_tensor("all_reduce_", "x", x);
    if (x.is_contiguous()) {
      all_reduce_into(x, x, op, std::string(group_name));
    } else {
      at::Tensor dense = x.contiguous();
      all_reduce_into(dense, dense, op, std::string(group_name));
      x.copy_(dense);
    }
  });
}

// x [shares of this rank, ...]: the sum of all ranks' shares along a tree.
at::Tensor all_reduce_shares(const at::Tensor& x, c10::string_view group_name) {
  constexpr const char* kOp = "all_reduce_shares";
  return with_python_errors([&] {
    check_cpu_tensor(kOp, "x", x);
    const int64_t world = process_group_of(std::string(group_name))->getSize();
    TORCH_CHECK_VALUE(x.dim() > 0 && at::isFloatingType(x.scalar_type()), kOp, ": x is ", x.scalar_type(), x.sizes(),
                      ", expected shares of a floating type");
    TORCH_CHECK_VALUE(x.size(0) * world == kVirtualShards, kOp, ": x has ", x.size(0), " shares on each of ", world,
                      " ranks, expected ", kVirtualShards, " in all");
    at::Tensor share = tree_sum(x.to(wide_type(x.scalar_type())).unbind());
    const int64_t cols = share.dim() > 1 ? std::max<int64_t>(1, share.size(-1)) : 1;
    const at::Tensor rows = share.contiguous().view({share.numel() / cols, cols});
    return tree_all_reduce(rows, {ReduceOp::tree, 0}, std::string(group_name)).view(share.sizes()).to(x.scalar_type());
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(pypar, CPU, m) {
  m.impl("all_reduce", all_reduce);
  m.impl("all_reduce_", all_reduce_);
  m.impl("all_reduce_shares", all_reduce_shares);
}

}  // namespace pypar
