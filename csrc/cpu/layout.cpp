#include "cpu/layout.h"

#include <numeric>

#include "cpu/reduce.h"

namespace pypar {

bool is_layout(const char* op, std::string_view determinism) {
  TORCH_CHECK_VALUE(determinism == "run" || determinism == "layout", op, ": determinism is '", determinism,
                    "', expected 'run' or 'layout'");
  return determinism == "layout";
}

std::vector<int64_t> virtual_begins(const char* op, const char* dim, at::IntArrayRef sizes, int64_t rank) {
  const auto world = static_cast<int64_t>(sizes.size());
  TORCH_CHECK_VALUE(world > 0 && kVirtualShards % world == 0, op, ": determinism 'layout' adds ", kVirtualShards,
                    " virtual shards along a tree, of which ", world,
                    " ranks can't have whole branches; use 1, 2, 4 or 8 ranks, or determinism 'run'");
  const int64_t full = std::accumulate(sizes.begin(), sizes.end(), int64_t{0});
  auto begin_of = [&](int64_t shard) {  // as torch.tensor_split cuts
    return shard * (full / kVirtualShards) + std::min(shard, full % kVirtualShards);
  };
  const int64_t per = kVirtualShards / world;
  std::vector<int64_t> fitting;
  for (int64_t r = 0; r < world; ++r) fitting.push_back(begin_of((r + 1) * per) - begin_of(r * per));
  TORCH_CHECK_VALUE(sizes == at::IntArrayRef(fitting), op, ": ", dim, " = ", full, " is cut ", sizes,
                    " over the ranks, but determinism 'layout' cuts it into ", kVirtualShards,
                    " virtual shards, of which each rank has ", per, ": cut it ", at::IntArrayRef(fitting),
                    full % kVirtualShards == 0 ? "" : ", or make it a multiple of 8 and cut it evenly",
                    ", or use determinism 'run'");
  std::vector<int64_t> begins;
  for (int64_t p = 0; p <= per; ++p) begins.push_back(begin_of(rank * per + p) - begin_of(rank * per));
  return begins;
}

at::ScalarType wide_type(at::ScalarType type) {
  return type == at::kHalf || type == at::kBFloat16 ? at::kFloat : type;
}

Factor factor_of(const at::Tensor& x) {
  return {x.const_data_ptr(), x.stride(0), x.stride(1)};
}

at::Tensor fixed_mm(const at::Tensor& x, const at::Tensor& w) {
  at::Tensor out = at::empty({x.size(0), w.size(0)}, x.options().dtype(wide_type(x.scalar_type())));
  fixed_product({{factor_of(x), factor_of(w), {0, x.size(1)}}}, 1, dtype_of(x), x.size(0), w.size(0),
                out.mutable_data_ptr());
  return out;
}

LayoutShare::LayoutShare(const char* op, at::TensorList xs, at::TensorList weights,
                         c10::OptionalArrayRef<int64_t> sizes, const std::string& group_name) {
  const auto group = process_group_of(group_name);
  const auto world = static_cast<size_t>(group->getSize());
  TORCH_CHECK_VALUE(!sizes.has_value() || sizes->size() == xs.size() * world, op, ": sizes has ",
                    sizes.has_value() ? sizes->size() : 0, " entries, expected ", world, " for each of ", xs.size(),
                    " inputs");
  std::vector<FixedTerm> terms;
  how = {ReduceOp::tree, 0xcbf29ce484222325ull};
  for (size_t i = 0; i < xs.size(); ++i) {
    const int64_t own = xs[i].size(1);
    std::vector<int64_t> of_ranks(world, own);
    if (sizes.has_value()) of_ranks = sizes->slice(i * world, world).vec();
    TORCH_CHECK_VALUE(of_ranks[static_cast<size_t>(group->getRank())] == own, op, ": K is ", own, " in x on rank ",
                      group->getRank(), ", but sizes says ", of_ranks[static_cast<size_t>(group->getRank())]);
    terms.push_back({factor_of(xs[i]), factor_of(weights[i]), virtual_begins(op, "K", of_ranks, group->getRank())});
    for (int64_t n : of_ranks) how.facts = (how.facts ^ static_cast<uint64_t>(n)) * 0x100000001b3ull;
  }
  const int64_t M = xs[0].size(0), N = weights[0].size(0);
  sum = at::empty({M, N}, xs[0].options().dtype(wide_type(xs[0].scalar_type())));
  fixed_product(terms, static_cast<int>(kVirtualShards / static_cast<int64_t>(world)), dtype_of(xs[0]), M, N,
                sum.mutable_data_ptr());
}

at::Tensor tree_sum(std::vector<at::Tensor> parts) {
  for (; parts.size() > 1; parts.resize(parts.size() / 2)) {
    for (size_t i = 0; i < parts.size() / 2; ++i) parts[i] = parts[2 * i] + parts[2 * i + 1];
  }
  return parts[0];
}

at::Tensor tree_of_gathered(const at::Tensor& share, const std::string& group_name) {
  static const auto all_gather =
      c10::Dispatcher::singleton()
          .findSchemaOrThrow("pypar::all_gather", "")
          .typed<at::Tensor(const at::Tensor&, c10::string_view, c10::OptionalArrayRef<int64_t>)>();
  return tree_sum(all_gather.call(share.unsqueeze(0), group_name, std::nullopt).unbind());
}

at::Tensor tree_all_reduce(const at::Tensor& share, RowSum how, const std::string& group_name) {
  const auto communicator = find_communicator(group_name);
  if (communicator == nullptr) return tree_of_gathered(share, group_name);
  at::Tensor out = at::empty(share.sizes(), share.options());
  const int64_t rows = share.size(0), row = row_items(share);
  const auto row_bytes = row * share.element_size();
  const auto* data = static_cast<const std::byte*>(share.const_data_ptr());
  communicator->all_reduce_rows(
      rows, row,
      [&](int64_t begin, int64_t num, void* to) {
        copy_bytes(to, data + begin * row_bytes, static_cast<size_t>(num * row_bytes));
      },
      out.mutable_data_ptr(), nullptr, communicator->default_deadline(), dtype_of(share), how);
  return out;
}

}  // namespace pypar
