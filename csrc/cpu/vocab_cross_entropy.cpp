// The loss over a vocabulary that is cut over the ranks: each rank reads its columns once, then the ranks exchange a
// few numbers per row and add them in rank order, each for itself.

#include <cmath>
#include <cstring>
#include <limits>

#include <torch/library.h>

#include "cpu/matmul.h"
#include "cpu/vocab_rows.h"

namespace pypar {

namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

at::ScalarType wide_type(const at::Tensor& x) {
  return x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

// Which columns of the vocabulary this rank holds, which rows count, and how the loss is smoothed.
struct Task {
  const char* op;
  std::string group_name;
  int rank, world;
  std::vector<int64_t> sizes;
  int64_t begin = 0, total = 0;  // of the own columns; of the vocabulary
  const int64_t* targets;
  int64_t rows, ignore_index;
  double smoothing;
  at::Tensor kept;  // what `targets` points to

  Task(const char* name, int64_t columns, const at::Tensor& target, int64_t num_rows,
       c10::OptionalArrayRef<int64_t> given_sizes, int64_t ignored, double label_smoothing, c10::string_view group)
      : op(name), group_name(group), rows(num_rows), ignore_index(ignored), smoothing(label_smoothing) {
    const auto process_group = process_group_of(group_name);
    rank = process_group->getRank(), world = process_group->getSize();
    sizes = given_sizes.has_value() ? given_sizes->vec() : std::vector<int64_t>(static_cast<size_t>(world), columns);
    TORCH_CHECK_VALUE(static_cast<int>(sizes.size()) == world, op, ": sizes has ", sizes.size(), " entries for ", world,
                      " ranks");
    TORCH_CHECK_VALUE(sizes[static_cast<size_t>(rank)] == columns, op, ": rank ", rank, " holds ", columns,
                      " columns of the vocabulary, but sizes says ", sizes[static_cast<size_t>(rank)]);
    for (int r = 0; r < world; ++r) {
      const int64_t size = sizes[static_cast<size_t>(r)];
      TORCH_CHECK_VALUE(size >= 0, op, ": sizes ", sizes, " has a negative entry");
      begin += r < rank ? size : 0;
      total += size;
    }
    TORCH_CHECK_VALUE(smoothing >= 0 && smoothing <= 1, op, ": label_smoothing is ", smoothing,
                      ", expected a number from 0 to 1");
    check_cpu_tensor(op, "target", target);
    TORCH_CHECK_VALUE(target.scalar_type() == at::kLong && target.dim() == 1 && target.size(0) == rows, op,
                      ": target is ", target.scalar_type(), target.sizes(), ", expected Long[", rows, "]");
    kept = target.contiguous();
    targets = kept.const_data_ptr<int64_t>();
    for (int64_t t = 0; t < rows; ++t) {
      TORCH_CHECK_VALUE(ignores(t) || (targets[t] >= 0 && targets[t] < total), op, ": target[", t, "] is ", targets[t],
                        ", outside the vocabulary of ", total, " and not the ignore_index ", ignore_index, " (rank ",
                        rank, ")");
    }
  }

  bool ignores(int64_t t) const { return targets[t] == ignore_index; }
  // Where the target of row t lies among the own columns; -1: another rank has it.
  int64_t own_column(int64_t t) const {
    const int64_t v = targets[t] - begin;
    return v >= 0 && v < sizes[static_cast<size_t>(rank)] ? v : -1;
  }
  int owner(int64_t t) const {
    int64_t v = targets[t];
    int r = 0;
    while (v >= sizes[static_cast<size_t>(r)]) v -= sizes[static_cast<size_t>(r++)];
    return r;
  }
  double columns_of(int r) const { return static_cast<double>(sizes[static_cast<size_t>(r)]); }
};

// What all ranks must agree on and shapes don't show: else the loss would be wrong without a word.
struct Facts {
  uint64_t sizes, task;

  static Facts of(const Task& task, int64_t first, int64_t num) {
    Facts facts{14695981039346656037u, 14695981039346656037u};
    for (int64_t n : task.sizes) add(facts.sizes, n);
    for (int64_t t = first; t < first + num; ++t) add(facts.task, task.targets[t]);
    add(facts.task, task.ignore_index);
    add(facts.task, __builtin_bit_cast(int64_t, task.smoothing));
    return facts;
  }
  // FNV-1a, a word at a time.
  static void add(uint64_t& hash, int64_t value) { hash = (hash ^ static_cast<uint64_t>(value)) * 1099511628211u; }
  static Facts at(const void* message) {
    Facts facts;
    std::memcpy(&facts, message, sizeof facts);
    return facts;
  }
};

// Every rank compares the same facts, so either all of them throw or none.
void check_agreement(const Facts& rank_0s, const Facts& theirs, int r, const Task& task) {
  const bool same_sizes = theirs.sizes == rank_0s.sizes;
  if (same_sizes && theirs.task == rank_0s.task) return;
  throw PeerError(
      "the ranks of group '" + task.group_name + "' disagree in " + task.op + ": rank " + std::to_string(r) + " has " +
      (same_sizes ? "another target, ignore_index or label_smoothing than rank 0; they must be the same on all"
                  : "other sizes of the vocabulary's shards than rank 0; give `sizes`, the same on all ranks"));
}

const std::byte* row_of(const at::Tensor& x, int64_t t) {
  return static_cast<const std::byte*>(x.const_data_ptr()) + t * x.stride(0) * x.element_size();
}

// x of all ranks, one below the other. Whatever ends the wait says which op it ended.
at::Tensor gather(const at::Tensor& x, const Task& task) {
  static const auto all_gather =
      c10::Dispatcher::singleton()
          .findSchemaOrThrow("pypar::all_gather", "")
          .typed<at::Tensor(const at::Tensor&, c10::string_view, c10::OptionalArrayRef<int64_t>)>();
  try {
    return all_gather.call(x, task.group_name, std::nullopt);
  } catch (const PythonPeerError& error) {
    throw PeerError(std::string(task.op) + " of " + std::to_string(task.rows) + " rows on rank " +
                    std::to_string(task.rank) + ": " + error.what());
  }
}

struct Sums {
  double loss = 0;
  int64_t count = 0;
};

// Rows [first, first + rows of logits) of the task: adds their losses, and writes max and sum of e^(x - max) over the
// whole vocabulary to stats[0] and stats[1] (0 and 1 where the target is ignored).
template <typename T>
void add_losses(Sums& sums, T* max_out, T* sum_out, const at::Tensor& logits, const Task& task, int64_t first) {
  const int64_t rows = logits.size(0), columns = logits.size(1);
  const int planes = task.smoothing > 0 ? 4 : 3;  // max, sum, the target's logit, the sum of the logits
  constexpr int64_t kFacts = sizeof(Facts) / sizeof(T);
  at::Tensor mine = at::zeros({1, kFacts + planes * rows}, at::TensorOptions().dtype(wide_type(logits)));
  T* out = mine.mutable_data_ptr<T>();
  const Facts facts = Facts::of(task, first, rows);
  std::memcpy(out, &facts, sizeof facts);
  out += kFacts;
  const DType dtype = dtype_of(logits);
  for (int64_t t = 0; t < rows; ++t) {
    if (task.ignores(first + t)) continue;
    const RowStats s = row_stats(row_of(logits, t), columns, dtype, planes == 4);
    out[t] = static_cast<T>(s.max), out[rows + t] = static_cast<T>(s.sum);
    if (const int64_t v = task.own_column(first + t); v >= 0) {
      const RowStats target = row_stats(row_of(logits, t) + v * logits.element_size(), 1, dtype, true);
      out[2 * rows + t] = static_cast<T>(target.total);
    }
    if (planes == 4) out[3 * rows + t] = static_cast<T>(s.total);
  }

  const at::Tensor all = gather(mine, task);
  std::vector<const T*> of;
  for (int r = 0; r < task.world; ++r) {
    of.push_back(all.const_data_ptr<T>() + r * all.stride(0));
    check_agreement(Facts::at(all.const_data_ptr()), Facts::at(of.back()), r, task);
    of.back() += kFacts;
  }
  for (int64_t t = 0; t < rows; ++t) {
    max_out[t] = 0, sum_out[t] = 1;
    if (task.ignores(first + t)) continue;
    double max = -kInfinity, sum = 0, total = 0;
    for (const T* s : of) max = s[t] > max ? static_cast<double>(s[t]) : max;
    for (const T* s : of) {
      const double scale = s[t] == max ? 1.0 : std::exp(static_cast<double>(s[t]) - max);
      if (s[rows + t] != 0) sum += static_cast<double>(s[rows + t]) * scale;
      if (planes == 4) total += static_cast<double>(s[3 * rows + t]);
    }
    max_out[t] = static_cast<T>(max), sum_out[t] = static_cast<T>(sum);
    const double target = of[static_cast<size_t>(task.owner(first + t))][2 * rows + t];
    double loss = max - target;
    if (planes == 4) {
      loss = (1 - task.smoothing) * loss + task.smoothing * (max - total / static_cast<double>(task.total));
    }
    sums.loss += std::log(sum) + loss;
    ++sums.count;
  }
}

void add_losses(Sums& sums, at::Tensor stats, const at::Tensor& logits, const Task& task, int64_t first) {
  AT_DISPATCH_FLOATING_TYPES(stats.scalar_type(), "vocab_cross_entropy", [&] {
    add_losses(sums, stats.mutable_data_ptr<scalar_t>(), stats.mutable_data_ptr<scalar_t>() + stats.stride(0), logits,
               task, first);
  });
}

// The gradient of dloss * the sum of the losses of these rows; out may be logits.
void write_grads(at::Tensor& out, const at::Tensor& logits, const at::Tensor& stats, double dloss, const Task& task,
                 int64_t first) {
  const int64_t rows = logits.size(0), columns = logits.size(1), item = logits.element_size();
  const DType dtype = dtype_of(logits);
  AT_DISPATCH_FLOATING_TYPES(stats.scalar_type(), "vocab_cross_entropy", [&] {
    const scalar_t *max = stats.const_data_ptr<scalar_t>(), *sum = max + stats.stride(0);
    auto* dst = static_cast<std::byte*>(out.mutable_data_ptr());
    for (int64_t t = 0; t < rows; ++t, dst += columns * item) {
      if (task.ignores(first + t)) {
        std::memset(dst, 0, static_cast<size_t>(columns * item));
        continue;
      }
      const double less = dloss * task.smoothing / static_cast<double>(task.total);
      row_grad(dst, row_of(logits, t), columns, dtype,
               {static_cast<double>(max[t]), dloss / static_cast<double>(sum[t]), less, (1 - task.smoothing) * dloss,
                task.own_column(first + t)});
    }
  });
}

// Columns next to each other; rows may lie apart.
at::Tensor readable(const at::Tensor& logits) {
  return logits.size(1) <= 1 || logits.stride(1) == 1 ? logits : logits.contiguous();
}

std::pair<at::Tensor, at::Tensor> scalars(const Sums& sums, at::TensorOptions options) {
  return {at::scalar_tensor(sums.loss, options), at::scalar_tensor(sums.count, options)};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> vocab_cross_entropy(const at::Tensor& logits, const at::Tensor& target,
                                                                   c10::OptionalArrayRef<int64_t> sizes,
                                                                   int64_t ignore_index, double label_smoothing,
                                                                   c10::string_view group_name) {
  constexpr const char* kOp = "vocab_cross_entropy";
  return with_python_errors([&] {
    check_matrix(kOp, "logits", logits, {});
    const Task task(kOp, logits.size(1), target, logits.size(0), sizes, ignore_index, label_smoothing, group_name);
    at::Tensor stats = at::empty({2, logits.size(0)}, logits.options().dtype(wide_type(logits)));
    Sums sums;
    add_losses(sums, stats, readable(logits), task, 0);
    const auto [loss, count] = scalars(sums, stats.options());
    return std::make_tuple(loss, count, stats);
  });
}

at::Tensor vocab_cross_entropy_dlogits(const at::Tensor& logits, const at::Tensor& target, const at::Tensor& stats,
                                       const at::Tensor& dloss, c10::OptionalArrayRef<int64_t> sizes,
                                       int64_t ignore_index, double label_smoothing, c10::string_view group_name) {
  constexpr const char* kOp = "vocab_cross_entropy_dlogits";
  return with_python_errors([&] {
    check_matrix(kOp, "logits", logits, {});
    const Task task(kOp, logits.size(1), target, logits.size(0), sizes, ignore_index, label_smoothing, group_name);
    TORCH_CHECK_VALUE(stats.dim() == 2 && stats.size(0) == 2 && stats.size(1) == logits.size(0) &&
                          stats.scalar_type() == wide_type(logits) && dloss.numel() == 1,
                      kOp, ": stats is ", stats.scalar_type(), stats.sizes(), " and dloss ", dloss.sizes(),
                      ", expected ", wide_type(logits), "[2, ", logits.size(0), "] and []");
    at::Tensor dlogits = at::empty(logits.sizes(), logits.options());
    write_grads(dlogits, readable(logits), stats.contiguous(), dloss.item<double>(), task, 0);
    return dlogits;
  });
}

// The logits of chunk_rows rows at a time, in one buffer that their gradient then overwrites.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> linear_vocab_cross_entropy(
    const at::Tensor& hidden, const at::Tensor& weight, const at::Tensor& target, c10::OptionalArrayRef<int64_t> sizes,
    int64_t ignore_index, double label_smoothing, int64_t chunk_rows, bool needs_dhidden, bool needs_dweight,
    c10::string_view group_name) {
  constexpr const char* kOp = "linear_vocab_cross_entropy";
  return with_python_errors([&] {
    check_matrix(kOp, "hidden", hidden, {}), check_matrix(kOp, "weight", weight, hidden);
    Sizes shapes(kOp);
    shapes.last("hidden", hidden, "K"), shapes.last("weight", weight, "K");
    TORCH_CHECK_VALUE(chunk_rows > 0, kOp, ": chunk_rows is ", chunk_rows, ", expected at least 1");
    const int64_t rows = hidden.size(0), columns = weight.size(0);
    const Task task(kOp, columns, target, rows, sizes, ignore_index, label_smoothing, group_name);
    const auto wide = hidden.options().dtype(wide_type(hidden));
    at::Tensor buffer = at::empty({std::min(chunk_rows, rows), columns}, hidden.options());
    at::Tensor dhidden = at::empty({needs_dhidden ? rows : 0, hidden.size(1)}, hidden.options());
    WeightGrad dweight(needs_dweight ? columns : 0, hidden.size(1), hidden.scalar_type());
    Sums sums;
    int64_t first = 0;
    do {  // with no rows, too: the ranks compare what they were asked
      const int64_t num = std::min(chunk_rows, rows - first);
      const at::Tensor x = hidden.narrow(0, first, num);
      at::Tensor logits = buffer.narrow(0, 0, num), stats = at::empty({2, num}, wide);
      mm_into(logits, x, weight, false);
      add_losses(sums, stats, logits, task, first);
      if (needs_dhidden || needs_dweight) write_grads(logits, logits, stats, 1.0, task, first);
      if (needs_dhidden) mm_into(dhidden.narrow(0, first, num), logits, weight.t(), false);
      if (needs_dweight) dweight.add(logits, x);
      first += num;
    } while (first < rows);
    if (needs_dhidden) {
      static const auto all_reduce_ = c10::Dispatcher::singleton()
                                          .findSchemaOrThrow("pypar::all_reduce_", "")
                                          .typed<void(at::Tensor&, c10::string_view, c10::string_view)>();
      all_reduce_.call(dhidden, "sum", group_name);
    }
    const auto [loss, count] = scalars(sums, wide);
    return std::make_tuple(loss, count, dhidden, dweight.sum());
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(pypar, CPU, m) {
  m.impl("vocab_cross_entropy", vocab_cross_entropy);
  m.impl("vocab_cross_entropy_dlogits", vocab_cross_entropy_dlogits);
  m.impl("linear_vocab_cross_entropy", linear_vocab_cross_entropy);
}

}  // namespace pypar
