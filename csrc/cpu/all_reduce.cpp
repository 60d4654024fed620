#include <torch/library.h>

#include "cpu/tensors.h"

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

}  // namespace

TORCH_LIBRARY_IMPL(pypar, CPU, m) {
  m.impl("all_reduce", all_reduce);
  m.impl("all_reduce_", all_reduce_);
}

}  // namespace pypar
