// all_reduce of sparse tensors: every rank gets everybody's indices and values and adds them up in rank order.

#include <array>
#include <numeric>

#include <ATen/ATen.h>

#include "comm/launch.h"
#include "comm/tensors.h"

namespace pypar {

namespace {

// What ranks must agree on, but for the first entry.
constexpr size_t kMaxDims = 12;
using Shape = std::array<int64_t, 4 + kMaxDims>;  // values, sparse dims, dense dims, dims, sizes

Shape shape_of(const at::Tensor& x) {
  if (x.dim() > static_cast<int64_t>(kMaxDims)) refuse("all_reduce takes sparse tensors of at most 12 dimensions");
  Shape shape{};
  shape[0] = x._nnz();
  shape[1] = x.sparse_dim();
  shape[2] = x.dense_dim();
  shape[3] = x.dim();
  std::copy(x.sizes().begin(), x.sizes().end(), shape.begin() + 4);
  return shape;
}

std::string text_of(const Shape& shape) {
  const at::IntArrayRef sizes(shape.data() + 4, static_cast<size_t>(shape[3]));
  return c10d::toString(sizes) + " with " + std::to_string(shape[1]) + " sparse dims";
}

// Everybody's tensors of equal row size, one below the other.
at::Tensor gather_rows(Communicator& communicator, const at::Tensor& rows, const std::vector<int64_t>& counts,
                       Deadline deadline) {
  const at::Tensor own = rows.contiguous();
  auto sizes = own.sizes().vec();
  const int64_t row_bytes =
      std::accumulate(sizes.begin() + 1, sizes.end(), int64_t{own.element_size()}, std::multiplies<>());
  sizes[0] = std::accumulate(counts.begin(), counts.end(), int64_t{0});
  at::Tensor all = at::empty(sizes, own.options());
  std::vector<int64_t> bytes;
  std::vector<void*> parts;
  auto* at = static_cast<std::byte*>(all.data_ptr());
  for (int64_t n : counts) {
    parts.push_back(at);
    bytes.push_back(n * row_bytes);
    at += bytes.back();
  }
  communicator.all_gather(own.data_ptr(), bytes.data(), parts.data(), deadline, movable_dtype(own));
  return all;
}

void reduce_sparse(Communicator& communicator, at::Tensor tensor, Deadline deadline) {
  at::NoGradGuard no_grad;
  const at::Tensor input = tensor.coalesce();
  const Shape own = shape_of(input);
  const auto world = static_cast<size_t>(communicator.world());
  std::vector<Shape> shapes(world);
  const std::vector<int64_t> bytes(world, sizeof(Shape));
  std::vector<void*> parts;
  for (auto& shape : shapes) parts.push_back(shape.data());
  communicator.all_gather(own.data(), bytes.data(), parts.data(), deadline);
  std::vector<int64_t> counts;
  for (size_t r = 0; r < world; ++r) {
    counts.push_back(shapes[r][0]);
    if (std::equal(own.begin() + 1, own.end(), shapes[r].begin() + 1)) continue;
    throw PeerError("the ranks of group '" + communicator.name() + "' disagree in all_reduce of sparse tensors: " +
                    communicator.rank_text(communicator.rank()) + " has " + text_of(own) + ", " +
                    communicator.rank_text(static_cast<int>(r)) + " has " + text_of(shapes[r]));
  }
  const at::Tensor indices = gather_rows(communicator, input.indices().t(), counts, deadline);
  const at::Tensor values = gather_rows(communicator, input.values(), counts, deadline);
  at::Tensor sum;
  int64_t begin = 0;
  for (int64_t n : counts) {
    const at::Tensor part = at::_sparse_coo_tensor_unsafe(indices.narrow(0, begin, n).t(), values.narrow(0, begin, n),
                                                          input.sizes(), input.options());
    sum = sum.defined() ? sum + part : part;
    begin += n;
  }
  tensor.copy_(sum.coalesce());
}

}  // namespace

ProcessGroup::WorkPtr ProcessGroup::allreduce_sparse(Tensors& tensors, const c10d::AllreduceOptions& options) {
  with_python_errors([&] {
    if (tensors.size() != 1) refuse("all_reduce of sparse tensors requires a single-element tensor list");
    if (tensors[0].layout() != at::kSparse) refuse("allreduce_sparse takes tensors of layout torch.sparse_coo");
    if (options.reduceOp.op_ != c10d::ReduceOp::SUM) refuse("all_reduce of sparse tensors only supports ReduceOp.SUM");
  });
  return launch(c10d::OpType::_ALLREDUCE_SPARSE, "pypar:sparse_all_reduce", options.asyncOp, options.timeout, tensors,
                {tensors}, [this, tensors, options](Deadline d) mutable {
                  if (hosts_) {
                    hosts_->run_whole(d, [&](c10d::Backend& gloo) { return gloo.allreduce(tensors, options); });
                  } else {
                    reduce_sparse(*communicator_, tensors[0], d);
                  }
                });
}

}  // namespace pypar
