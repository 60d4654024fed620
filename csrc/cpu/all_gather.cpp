#include <numeric>

#include <torch/library.h>

#include "cpu/tensors.h"

namespace pypar {

namespace {

// counts: rows of every rank.
void all_gather_into(at::Tensor& out, const at::Tensor& in, const std::vector<int64_t>& counts,
                     const std::string& group_name) {
  const auto communicator = find_communicator(group_name);
  if (communicator == nullptr) {
    const auto group = process_group_of(group_name);
    const int64_t most = *std::max_element(counts.begin(), counts.end());
    auto sizes = in.sizes().vec();
    sizes[0] = most;
    at::Tensor padded = at::zeros(sizes, in.options());
    padded.narrow(0, 0, in.size(0)).copy_(in);
    sizes[0] = most * group->getSize();
    at::Tensor all = at::empty(sizes, in.options());
    group->_allgather_base(all, padded)->wait();
    for (int64_t r = 0, at = 0; r < group->getSize(); at += counts[static_cast<size_t>(r)], ++r) {
      const int64_t rows = counts[static_cast<size_t>(r)];
      out.narrow(0, at, rows).copy_(all.narrow(0, r * most, rows));
    }
    return;
  }
  const int64_t row_bytes = row_items(in) * in.element_size();
  std::vector<int64_t> bytes;
  std::vector<void*> outs;
  auto* data = static_cast<std::byte*>(out.mutable_data_ptr());
  for (int64_t count : counts) {
    outs.push_back(data);
    bytes.push_back(count * row_bytes);
    data += bytes.back();
  }
  communicator->all_gather(in.const_data_ptr(), bytes.data(), outs.data(), communicator->default_deadline(),
                           dtype_of(in));
}

// Rows of every rank: as given, or the same as here.
std::vector<int64_t> counts_of(const at::Tensor& x, int rank, int world, c10::OptionalArrayRef<int64_t> splits) {
  TORCH_CHECK_VALUE(x.dim() >= 1, "all_gather: x has no dim 0 to gather along");
  if (!splits.has_value()) return std::vector<int64_t>(static_cast<size_t>(world), x.size(0));
  const int64_t total = std::accumulate(splits->begin(), splits->end(), int64_t{0});
  auto counts = rows_per_rank("all_gather", splits, total, world);
  TORCH_CHECK_VALUE(counts[static_cast<size_t>(rank)] == x.size(0), "all_gather: splits ", *splits, " say ",
                    counts[static_cast<size_t>(rank)], " rows for rank ", rank, ", x has ", x.size(0));
  return counts;
}

at::Tensor all_gather(const at::Tensor& x, c10::string_view group_name, c10::OptionalArrayRef<int64_t> splits) {
  return with_python_errors([&] {
    check_cpu_tensor("all_gather", "x", x);
    const auto group = process_group_of(std::string(group_name));
    const auto counts = counts_of(x, group->getRank(), group->getSize(), splits);
    auto sizes = x.sizes().vec();
    sizes[0] = std::accumulate(counts.begin(), counts.end(), int64_t{0});
    at::Tensor out = at::empty(sizes, x.options());
    all_gather_into(out, x.contiguous(), counts, std::string(group_name));
    return out;
  });
}

void all_gather_out(at::Tensor& out, const at::Tensor& x, c10::string_view group_name,
                    c10::OptionalArrayRef<int64_t> splits) {
  with_python_errors([&] {
    check_cpu_tensor("all_gather", "x", x);
    check_cpu_tensor("all_gather", "out", out);
    const auto group = process_group_of(std::string(group_name));
    const auto counts = counts_of(x, group->getRank(), group->getSize(), splits);
    const int64_t rows = std::accumulate(counts.begin(), counts.end(), int64_t{0});
    TORCH_CHECK_VALUE(out.dim() == x.dim() && out.size(0) == rows && out.sizes().slice(1) == x.sizes().slice(1) &&
                          out.scalar_type() == x.scalar_type(),
                      "all_gather: out is ", out.scalar_type(), out.sizes(), ", expected ", x.scalar_type(), " with ",
                      rows, " rows of x ", x.sizes());
    at::Tensor dense = out.is_contiguous() ? out : at::empty_like(out, at::MemoryFormat::Contiguous);
    all_gather_into(dense, x.contiguous(), counts, std::string(group_name));
    if (!dense.is_same(out)) out.copy_(dense);
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(pypar, CPU, m) {
  m.impl("all_gather", all_gather);
  m.impl("all_gather_out", all_gather_out);
}

}  // namespace pypar
