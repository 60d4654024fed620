// Column-parallel matmuls that gather their input: no rank copies the others' rows, it multiplies them where they lie.

#include <numeric>

#include <torch/library.h>

#include "cpu/between_hosts.h"
#include "cpu/layout.h"

namespace pypar {

namespace {

// The ranks' rows of x, and where each rank's begin in the gathered matrix.
struct Rows {
  std::vector<int64_t> counts;
  int64_t total = 0;
  std::vector<int64_t> begins;

  Rows(const char* op, const at::Tensor& x, c10::OptionalArrayRef<int64_t> splits, int world, int rank) {
    counts = splits.has_value() ? splits->vec() : std::vector<int64_t>(static_cast<size_t>(world), x.size(0));
    TORCH_CHECK_VALUE(static_cast<int>(counts.size()) == world, op, ": splits has ", counts.size(), " entries for ",
                      world, " ranks");
    TORCH_CHECK_VALUE(counts[static_cast<size_t>(rank)] == x.size(0), op, ": x has ", x.size(0), " rows on rank ", rank,
                      ", but splits says ", counts[static_cast<size_t>(rank)]);
    for (int64_t n : counts) {
      begins.push_back(total);
      total += n;
    }
  }
};

// Calls consume(row of the gathered matrix, block [num, K]) for all rows of all ranks. row_flop: of consuming a row.
template <typename Consume>
void gather(const at::Tensor& x, const std::string& group_name, const Rows& rows, int64_t num_chunks, double row_flop,
            Consume&& consume) {
  const int64_t K = x.size(1);
  auto block = [&](int src, int64_t begin, int64_t num, const void* data) {
    consume(rows.begins[static_cast<size_t>(src)] + begin, rows_at(data, num, K, x.scalar_type()));
  };
  if (const auto communicator = find_communicator(group_name)) {
    return communicator->all_gather_rows(x.const_data_ptr(), rows.counts.data(), K, block,
                                         communicator->default_deadline(), dtype_of(x));
  }
  if (const auto hosts = find_hosts(group_name)) {
    return hosts->run([&](Deadline deadline) {
      const int chunks = num_chunks_of(*hosts, num_chunks, Overlap::gather, rows.total, K * x.element_size(),
                                       row_flop * static_cast<double>(rows.total), x.scalar_type(), deadline);
      hosts->all_gather_rows(x.const_data_ptr(), rows.counts, K, chunks, block, deadline, dtype_of(x));
    });
  }
  static const auto all_gather =
      c10::Dispatcher::singleton()
          .findSchemaOrThrow("pypar::all_gather", "")
          .typed<at::Tensor(const at::Tensor&, c10::string_view, c10::OptionalArrayRef<int64_t>)>();
  consume(0, all_gather.call(x, group_name, c10::OptionalArrayRef<int64_t>(rows.counts)));
}

std::pair<int, int> rank_and_world(const std::string& group_name) {
  const auto group = process_group_of(group_name);
  return {group->getRank(), group->getSize()};
}

std::vector<at::Tensor> all_gather_matmul(const at::Tensor& x, at::TensorList weights,
                                          const c10::List<std::optional<at::Tensor>>& biases,
                                          c10::OptionalArrayRef<int64_t> splits, c10::string_view group_name,
                                          c10::string_view determinism, int64_t num_chunks) {
  constexpr const char* kOp = "all_gather_matmul";
  return with_python_errors([&] {
    check_matrix(kOp, "x", x, {});
    TORCH_CHECK_VALUE(biases.empty() || biases.size() == weights.size(), kOp, ": ", biases.size(), " biases for ",
                      weights.size(), " weights");
    const auto [rank, world] = rank_and_world(std::string(group_name));
    const Rows rows(kOp, x, splits, world, rank);
    const bool layout = is_layout(kOp, determinism);
    std::vector<at::Tensor> ys;
    double row_flop = 0;
    for (const at::Tensor& w : weights) {
      Sizes sizes(kOp);
      check_matrix(kOp, "a weight", w, x);
      sizes.last("x", x, "K"), sizes.last("a weight", w, "K");
      ys.push_back(at::empty({rows.total, w.size(0)}, x.options()));
      row_flop += 2.0 * static_cast<double>(w.numel());
    }
    auto consume = [&](int64_t row, const at::Tensor& block) {
      for (size_t i = 0; i < weights.size(); ++i) {
        at::Tensor y = ys[i].narrow(0, row, block.size(0));
        const std::optional<at::Tensor> bias = biases.empty() ? std::nullopt : biases.get(i);
        if (layout) {
          at::Tensor sum = fixed_mm(block, weights[i]);
          Epilogue(kOp, bias, std::nullopt, block.size(0), y.size(1), y).add_to(sum);
          y.copy_(sum);
        } else if (bias.has_value() && bias->defined()) {
          at::addmm_out(y, *bias, block, weights[i].t());
        } else {
          mm_into(y, block, weights[i], false);
        }
      }
    };
    gather(x.contiguous(), std::string(group_name), rows, num_chunks, row_flop, consume);
    return ys;
  });
}

// dw_i = dy_i.T @ x of all ranks.
std::vector<at::Tensor> all_gather_matmul_dw(const at::Tensor& x, at::TensorList dys,
                                             c10::OptionalArrayRef<int64_t> splits, c10::string_view group_name,
                                             int64_t num_chunks) {
  constexpr const char* kOp = "all_gather_matmul_dw";
  return with_python_errors([&] {
    check_matrix(kOp, "x", x, {});
    const auto [rank, world] = rank_and_world(std::string(group_name));
    const Rows rows(kOp, x, splits, world, rank);
    std::vector<WeightGrad> sums;
    double row_flop = 0;
    for (const at::Tensor& dy : dys) {
      check_matrix(kOp, "a dy", dy, x);
      TORCH_CHECK_VALUE(dy.size(0) == rows.total, kOp, ": a dy has ", dy.size(0), " rows, expected ", rows.total);
      sums.emplace_back(dy.size(1), x.size(1), x.scalar_type());
      row_flop += 2.0 * static_cast<double>(dy.size(1) * x.size(1));
    }
    auto consume = [&](int64_t row, const at::Tensor& block) {
      for (size_t i = 0; i < sums.size(); ++i) sums[i].add(dys[i].narrow(0, row, block.size(0)), block);
    };
    gather(x.contiguous(), std::string(group_name), rows, num_chunks, row_flop, consume);
    std::vector<at::Tensor> dws;
    for (auto& sum : sums) dws.push_back(sum.result());
    return dws;
  });
}

// Of matmul_reduce_scatter: dx = dy of all ranks @ w, dw = dy of all ranks.T @ x, with one gather of dy.
std::tuple<at::Tensor, at::Tensor> all_gather_matmul_both(const at::Tensor& dy, const at::Tensor& x,
                                                          const at::Tensor& w, bool needs_dx, bool needs_dw,
                                                          c10::OptionalArrayRef<int64_t> splits,
                                                          c10::string_view group_name, int64_t num_chunks) {
  constexpr const char* kOp = "all_gather_matmul_both";
  return with_python_errors([&] {
    check_matrix(kOp, "dy", dy, {}), check_matrix(kOp, "x", x, dy), check_matrix(kOp, "w", w, dy);
    Sizes sizes(kOp);
    sizes.last("dy", dy, "N"), sizes.first("w", w, "N"), sizes.last("x", x, "K"), sizes.last("w", w, "K");
    const auto [rank, world] = rank_and_world(std::string(group_name));
    const Rows rows(kOp, dy, splits, world, rank);
    TORCH_CHECK_VALUE(x.size(0) == rows.total, kOp, ": x has ", x.size(0), " rows, expected ", rows.total);
    at::Tensor dx = needs_dx ? at::empty(x.sizes(), x.options()) : at::Tensor();
    WeightGrad dw(w.size(0), w.size(1), w.scalar_type());
    auto consume = [&](int64_t row, const at::Tensor& block) {
      const int64_t num = block.size(0);
      if (needs_dx) mm_into(dx.narrow(0, row, num), block, w.t(), false);
      if (needs_dw) dw.add(block, x.narrow(0, row, num));
    };
    const double row_flop = 2.0 * static_cast<double>(w.numel()) * (needs_dx + needs_dw);
    gather(dy.contiguous(), std::string(group_name), rows, num_chunks, row_flop, consume);
    return std::make_tuple(needs_dx ? dx : at::empty({0}, x.options()),
                           needs_dw ? dw.result() : at::empty({0}, w.options()));
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(pypar, CPU, m) {
  m.impl("all_gather_matmul", all_gather_matmul);
  m.impl("all_gather_matmul_dw", all_gather_matmul_dw);
  m.impl("all_gather_matmul_both", all_gather_matmul_both);
}

}  // namespace pypar
