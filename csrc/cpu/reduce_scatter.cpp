#include <numeric>

#include <torch/library.h>

#include "cpu/tensors.h"

namespace pypar {

namespace {

void reduce_scatter_into(at::Tensor& out, const at::Tensor& in, std::string_view op, const std::string& group_name,
                         c10::OptionalArrayRef<int64_t> splits) {
  const auto communicator = find_communicator(group_name);
  const auto group = communicator == nullptr ? process_group_of(group_name) : nullptr;
  const int world = communicator != nullptr ? communicator->world() : group->getSize();
  const int rank = communicator != nullptr ? communicator->rank() : group->getRank();
  auto counts = rows_per_rank("reduce_scatter", splits, in.size(0), world);
  TORCH_CHECK_VALUE(out.dim() == in.dim() && out.size(0) == counts[static_cast<size_t>(rank)] &&
                        out.sizes().slice(1) == in.sizes().slice(1) && out.scalar_type() == in.scalar_type(),
                    "reduce_scatter: out is ", out.scalar_type(), out.sizes(), ", expected ", in.scalar_type(),
                    " with ", counts[static_cast<size_t>(rank)], " rows for rank ", rank, " of x ", in.sizes());
  if (communicator == nullptr) {
    at::Tensor full = in.clone();
    std::vector<at::Tensor> tensors{full};
    c10d::AllreduceOptions options;
    options.reduceOp = c10d_reduce_op_of(op);
    group->allreduce(tensors, options)->wait();
    const int64_t begin = std::accumulate(counts.begin(), counts.begin() + rank, int64_t{0});
    out.copy_(full.narrow(0, begin, counts[static_cast<size_t>(rank)]));
    return;
  }
  const int64_t row = row_items(in);
  const auto row_bytes = static_cast<size_t>(row) * in.element_size();
  std::vector<const void*> ins;
  const auto* data = static_cast<const std::byte*>(in.const_data_ptr());
  for (int64_t& count : counts) {
    ins.push_back(data);
    data += static_cast<size_t>(count) * row_bytes;
    count *= row;
  }
  communicator->reduce_scatter(ins.data(), counts.data(), out.mutable_data_ptr(), dtype_of(in), reduce_op_of(op),
                               communicator->default_deadline());
}

at::Tensor reduce_scatter(const at::Tensor& x, c10::string_view op, c10::string_view group_name,
                          c10::OptionalArrayRef<int64_t> splits) {
  return with_python_errors([&] {
    check_cpu_tensor("reduce_scatter", "x", x);
    TORCH_CHECK_VALUE(x.dim() >= 1, "reduce_scatter: x has no dim 0 to scatter");
    const auto group = process_group_of(std::string(group_name));
    const auto counts = rows_per_rank("reduce_scatter", splits, x.size(0), group->getSize());
    auto sizes = x.sizes().vec();
    sizes[0] = counts[static_cast<size_t>(group->getRank())];
    at::Tensor out = at::empty(sizes, x.options());
    reduce_scatter_into(out, x.contiguous(), op, std::string(group_name), splits);
    return out;
  });
}

void reduce_scatter_out(at::Tensor& out, const at::Tensor& x, c10::string_view op, c10::string_view group_name,
                        c10::OptionalArrayRef<int64_t> splits) {
  with_python_errors([&] {
    check_cpu_tensor("reduce_scatter", "x", x);
    check_cpu_tensor("reduce_scatter", "out", out);
    TORCH_CHECK_VALUE(x.dim() >= 1, "reduce_scatter: x has no dim 0 to scatter");
    at::Tensor dense = out.is_contiguous() ? out : at::empty_like(out, at::MemoryFormat::Contiguous);
    reduce_scatter_into(dense, x.contiguous(), op, std::string(group_name), splits);
    if (!dense.is_same(out)) out.copy_(dense);
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(pypar, CPU, m) {
  m.impl("reduce_scatter", reduce_scatter);
  m.impl("reduce_scatter_out", reduce_scatter_out);
}

}  // namespace pypar
