// Row-parallel matmuls whose sum over ranks is scattered: each block is made in the memory that its owner reads.

#include <numeric>

#include <torch/library.h>

#include "cpu/between_hosts.h"
#include "cpu/layout.h"
#include "cpu/reduce.h"

namespace pypar {

namespace {

constexpr const char* kOp = "matmul_reduce_scatter";

at::Tensor tree_reduce_scatter(const LayoutShare& share, const std::vector<int64_t>& counts,
                               const std::vector<int64_t>& begins, size_t rank, const std::string& group_name) {
  const auto communicator = find_communicator(group_name);
  if (communicator == nullptr) return tree_of_gathered(share.sum, group_name).narrow(0, begins[rank], counts[rank]);
  at::Tensor sum = at::empty({counts[rank], share.sum.size(1)}, share.sum.options());
  const auto row_bytes = share.sum.size(1) * share.sum.element_size();
  const auto* data = static_cast<const std::byte*>(share.sum.const_data_ptr());
  communicator->reduce_scatter_rows(
      counts.data(), share.sum.size(1),
      [&](int dst, int64_t begin, int64_t num, void* to) {
        const auto* from = data + (begins[static_cast<size_t>(dst)] + begin) * row_bytes;
        copy_bytes(to, from, static_cast<size_t>(num * row_bytes));
      },
      sum.mutable_data_ptr(), nullptr, communicator->default_deadline(), dtype_of(sum), share.how);
  return sum;
}

at::Tensor matmul_reduce_scatter(at::TensorList xs, at::TensorList weights, const std::optional<at::Tensor>& bias,
                                 const std::optional<at::Tensor>& residual, c10::OptionalArrayRef<int64_t> splits,
                                 c10::string_view group_name, c10::string_view determinism,
                                 c10::OptionalArrayRef<int64_t> sizes, int64_t num_chunks) {
  return with_python_errors([&] {
    const auto [M, N] = check_products(kOp, xs, weights);
    const auto group = process_group_of(std::string(group_name));
    const auto rank = static_cast<size_t>(group->getRank());
    const auto counts = rows_per_rank(kOp, splits, M, group->getSize());
    std::vector<int64_t> begins(counts.size(), 0);
    std::partial_sum(counts.begin(), counts.end() - 1, begins.begin() + 1);
    at::Tensor y = at::empty({counts[rank], N}, xs[0].options());
    Epilogue epilogue(kOp, bias, residual, counts[rank], N, y);
    if (is_layout(kOp, determinism)) {
      const LayoutShare share(kOp, xs, weights, sizes, std::string(group_name));
      at::Tensor sum = tree_reduce_scatter(share, counts, begins, rank, std::string(group_name));
      epilogue.add_to(sum);
      return sum.to(y.scalar_type());
    }
    auto product = [&](int64_t begin, int64_t num, at::Tensor out) {
      for (size_t i = 0; i < xs.size(); ++i) mm_into(out, xs[i].narrow(0, begin, num), weights[i], i != 0);
    };
    if (const auto communicator = find_communicator(std::string(group_name))) {
      communicator->reduce_scatter_rows(
          counts.data(), N,
          [&](int dst, int64_t begin, int64_t num, void* data) {
            product(begins[static_cast<size_t>(dst)] + begin, num, rows_at(data, num, N, y.scalar_type()));
          },
          y.mutable_data_ptr(), std::ref(epilogue), communicator->default_deadline(), dtype_of(y));
      return y;
    }
    if (const auto hosts = find_hosts(std::string(group_name))) {
      Sums sums(*hosts, y);
      Epilogue more(kOp, sums.cast(bias), sums.cast(residual), counts[rank], N, sums.wide());
      hosts->run([&](Deadline deadline) {
        const int chunks = num_chunks_of(*hosts, num_chunks, Overlap::scatter, M, sums.row_bytes(), flop_of(xs, N),
                                         y.scalar_type(), deadline);
        hosts->reduce_scatter_rows(
            counts, N, chunks,
            [&](int dst, int64_t begin, int64_t num, void* data) {
              sums.share(num, data,
                         [&](const at::Tensor& out) { product(begins[static_cast<size_t>(dst)] + begin, num, out); });
            },
            sums.wide().mutable_data_ptr(), std::ref(more), deadline, sums.dtype());
      });
      sums.store();
      return y;
    }
    at::Tensor full = at::empty({M, N}, y.options());
    product(0, M, full);
    std::vector<at::Tensor> tensors{full};
    group->allreduce(tensors, {})->wait();
    y.copy_(full.narrow(0, begins[rank], counts[rank]));
    epilogue.add_to(y);
    return y;
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(pypar, CPU, m) {
  m.impl("matmul_reduce_scatter", matmul_reduce_scatter);
}

}  // namespace pypar
