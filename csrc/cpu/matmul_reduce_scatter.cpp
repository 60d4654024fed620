// Row-parallel matmuls whose sum over ranks is scattered: each block is made in the memory that its owner reads.

#include <numeric>

#include <torch/library.h>

#include "cpu/between_hosts.h"
#include "cpu/matmul.h"

namespace pypar {

namespace {

constexpr const char* kOp = "matmul_reduce_scatter";

at::Tensor matmul_reduce_scatter(at::TensorList xs, at::TensorList weights, const std::optional<at::Tensor>& bias,
                                 const std::optional<at::Tensor>& residual, c10::OptionalArrayRef<int64_t> splits,
                                 c10::string_view group_name, int64_t num_chunks) {
  return with_python_errors([&] {
    const auto [M, N] = check_products(kOp, xs, weights);
    const auto group = process_group_of(std::string(group_name));
    const auto rank = static_cast<size_t>(group->getRank());
    const auto counts = rows_per_rank(kOp, splits, M, group->getSize());
    std::vector<int64_t> begins(counts.size(), 0);
    std::partial_sum(counts.begin(), counts.end() - 1, begins.begin() + 1);
    at::Tensor y = at::empty({counts[rank], N}, xs[0].options());
    Epilogue epilogue(kOp, bias, residual, counts[rank], N, y);
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
