// Matmuls whose bits don't depend on what else is in the matrices: what determinism "layout" is made of.

#include <torch/library.h>

#include "cpu/layout.h"

namespace pypar {

namespace {

at::Tensor fixed_matmul(const at::Tensor& x, const at::Tensor& w, const std::optional<at::Tensor>& bias) {
  constexpr const char* kOp = "fixed_matmul";
  return with_python_errors([&] {
    check_products(kOp, {x}, {w});
    at::Tensor y = fixed_mm(x, w);
    Epilogue(kOp, bias, std::nullopt, x.size(0), w.size(0), x).add_to(y);
    return y.to(x.scalar_type());
  });
}

// The sums of the parts of K, of which sizes gives as many for each input: [parts, M, N], each rounded to the type.
at::Tensor fixed_matmul_shares(at::TensorList xs, at::TensorList weights, at::IntArrayRef sizes) {
  constexpr const char* kOp = "fixed_matmul_shares";
  return with_python_errors([&] {
    const auto [M, N] = check_products(kOp, xs, weights);
    TORCH_CHECK_VALUE(!sizes.empty() && sizes.size() % xs.size() == 0, kOp, ": ", sizes.size(), " sizes for ",
                      xs.size(), " inputs");
    const size_t parts = sizes.size() / xs.size();
    std::vector<FixedTerm> terms;
    for (size_t i = 0; i < xs.size(); ++i) {
      FixedTerm term{factor_of(xs[i]), factor_of(weights[i]), {0}};
      for (int64_t n : sizes.slice(i * parts, parts)) {
        TORCH_CHECK_VALUE(n >= 0, kOp, ": sizes ", sizes, " has a negative entry");
        term.begins.push_back(term.begins.back() + n);
      }
      TORCH_CHECK_VALUE(term.begins.back() == xs[i].size(1), kOp, ": K is ", xs[i].size(1), " in x, but ",
                        sizes.slice(i * parts, parts), " sum to ", term.begins.back());
      terms.push_back(std::move(term));
    }
    const auto wide = xs[0].options().dtype(wide_type(xs[0].scalar_type()));
    at::Tensor shares = at::empty({static_cast<int64_t>(parts), M, N}, xs[0].options());
    for (size_t p = 0; p < parts; ++p) {
      std::vector<FixedTerm> of_part = terms;
      for (FixedTerm& term : of_part) term.begins = {term.begins[p], term.begins[p + 1]};
      const bool same = wide.dtype() == shares.dtype();
      at::Tensor share = shares.select(0, static_cast<int64_t>(p)), sum = same ? share : at::empty({M, N}, wide);
      fixed_product(of_part, 1, dtype_of(xs[0]), M, N, sum.mutable_data_ptr());
      if (!same) share.copy_(sum);
    }
    return shares;
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(pypar, CPU, m) {
  m.impl("fixed_matmul", fixed_matmul);
  m.impl("fixed_matmul_shares", fixed_matmul_shares);
}

}  // namespace pypar
