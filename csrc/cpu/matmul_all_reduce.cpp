// Row-parallel matmuls whose sum every rank gets.

#include <torch/library.h>

#include "cpu/between_hosts.h"
#include "cpu/layout.h"

namespace pypar {

namespace {

constexpr const char* kOp = "matmul_all_reduce";

at::Tensor matmul_all_reduce(at::TensorList xs, at::TensorList weights, const std::optional<at::Tensor>& bias,
                             const std::optional<at::Tensor>& residual, c10::string_view group_name,
                             c10::string_view determinism, c10::OptionalArrayRef<int64_t> sizes, int64_t num_chunks) {
  return with_python_errors([&] {
    const auto [M, N] = check_products(kOp, xs, weights);
    if (is_layout(kOp, determinism)) {
      const LayoutShare share(kOp, xs, weights, sizes, std::string(group_name));
      const Epilogue epilogue(kOp, bias, residual, M, N, xs[0]);
      at::Tensor y = tree_all_reduce(share.sum, share.how, std::string(group_name));
      epilogue.add_to(y);
      return y.to(xs[0].scalar_type());
    }
    at::Tensor y = at::empty({M, N}, xs[0].options());
    Epilogue epilogue(kOp, bias, residual, M, N, y);
    auto product = [&](int64_t begin, int64_t num, at::Tensor out) {
      for (size_t i = 0; i < xs.size(); ++i) mm_into(out, xs[i].narrow(0, begin, num), weights[i], i != 0);
    };
    if (const auto communicator = find_communicator(std::string(group_name))) {
      communicator->all_reduce_rows(
          M, N,
          [&](int64_t begin, int64_t num, void* data) { product(begin, num, rows_at(data, num, N, y.scalar_type())); },
          y.mutable_data_ptr(), std::ref(epilogue), communicator->default_deadline(), dtype_of(y));
      return y;
    }
    if (const auto hosts = find_hosts(std::string(group_name))) {
      Sums sums(*hosts, y);
      Epilogue more(kOp, sums.cast(bias), sums.cast(residual), M, N, sums.wide());
      hosts->run([&](Deadline deadline) {
        const int chunks = num_chunks_of(*hosts, num_chunks, Overlap::reduce, M, sums.row_bytes(), flop_of(xs, N),
                                         y.scalar_type(), deadline);
        hosts->all_reduce_rows(
            M, N, chunks,
            [&](int64_t begin, int64_t num, void* data) {
              sums.share(num, data, [&](const at::Tensor& out) { product(begin, num, out); });
            },
            sums.wide().mutable_data_ptr(), std::ref(more), deadline, sums.dtype());
      });
      sums.store();
      return y;
    }
    product(0, M, y);
    std::vector<at::Tensor> tensors{y};
    process_group_of(std::string(group_name))->allreduce(tensors, {})->wait();
    epilogue.add_to(y);
    return y;
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(pypar, CPU, m) {
  m.impl("matmul_all_reduce", matmul_all_reduce);
}

}  // namespace pypar
