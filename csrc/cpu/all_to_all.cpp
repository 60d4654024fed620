#include <numeric>

#include <torch/library.h>

#include "cpu/tensors.h"

namespace pypar {

namespace {

// Even shares when no splits are given: dim 0 must then divide by the ranks, as in torch.distributed.all_to_all_single.
std::vector<int64_t> shares(const char* name, c10::OptionalArrayRef<int64_t> splits, int64_t rows, int world) {
  TORCH_CHECK_VALUE(splits.has_value() || rows % world == 0, "all_to_all: ", rows, " rows don't divide by ", world,
                    " ranks; give ", name);
  return rows_per_rank("all_to_all", splits, rows, world);
}

void all_to_all_into(at::Tensor& out, const at::Tensor& in, std::vector<int64_t> out_rows, std::vector<int64_t> in_rows,
                     const std::string& group_name) {
  const auto communicator = find_communicator(group_name);
  if (communicator == nullptr) {
    at::Tensor source = in;
    process_group_of(group_name)->alltoall_base(out, source, out_rows, in_rows)->wait();
    return;
  }
  const int64_t row_bytes = row_items(in) * in.element_size();
  std::vector<const void*> ins;
  std::vector<void*> outs;
  const auto* from = static_cast<const std::byte*>(in.const_data_ptr());
  auto* to = static_cast<std::byte*>(out.mutable_data_ptr());
  for (size_t r = 0; r < in_rows.size(); ++r) {
    ins.push_back(from);
    outs.push_back(to);
    from += in_rows[r] *= row_bytes;
    to += out_rows[r] *= row_bytes;
  }
  communicator->all_to_all(ins.data(), in_rows.data(), outs.data(), out_rows.data(), communicator->default_deadline(),
                           dtype_of(in));
}

void all_to_all_out(at::Tensor& out, const at::Tensor& x, c10::OptionalArrayRef<int64_t> out_splits,
                    c10::OptionalArrayRef<int64_t> in_splits, c10::string_view group_name) {
  with_python_errors([&] {
    check_cpu_tensor("all_to_all", "x", x);
    check_cpu_tensor("all_to_all", "out", out);
    TORCH_CHECK_VALUE(x.dim() >= 1 && out.dim() == x.dim() && out.sizes().slice(1) == x.sizes().slice(1) &&
                          out.scalar_type() == x.scalar_type(),
                      "all_to_all: out ", out.scalar_type(), out.sizes(), " and x ", x.scalar_type(), x.sizes(),
                      " differ in more than the rows");
    const int world = process_group_of(std::string(group_name))->getSize();
    at::Tensor dense = out.is_contiguous() ? out : at::empty_like(out, at::MemoryFormat::Contiguous);
    all_to_all_into(dense, x.contiguous(), shares("out_splits", out_splits, out.size(0), world),
                    shares("in_splits", in_splits, x.size(0), world), std::string(group_name));
    if (!dense.is_same(out)) out.copy_(dense);
  });
}

at::Tensor all_to_all(const at::Tensor& x, c10::OptionalArrayRef<int64_t> out_splits,
                      c10::OptionalArrayRef<int64_t> in_splits, c10::string_view group_name) {
  TORCH_CHECK_VALUE(x.dim() >= 1, "all_to_all: x has no dim 0 to split");
  auto sizes = x.sizes().vec();
  if (out_splits.has_value()) sizes[0] = std::accumulate(out_splits->begin(), out_splits->end(), int64_t{0});
  at::Tensor out = at::empty(sizes, x.options());
  all_to_all_out(out, x, out_splits, in_splits, group_name);
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(pypar, CPU, m) {
  m.impl("all_to_all", all_to_all);
  m.impl("all_to_all_out", all_to_all_out);
}

}  // namespace pypar
