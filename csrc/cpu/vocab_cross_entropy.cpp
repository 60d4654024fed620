// The loss over a vocabulary that is cut over the ranks: each rank reads its columns once, then the ranks exchange a
// few numbers per row and add them in rank order, each for itself.

#include <cmath>
#include <cstring>
#include <limits>

#include <torch/library.h>

#include "cpu/layout.h"
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
  bool layout = false;
  std::vector<int64_t>
      begins;  // of the own virtual shards, and the end of the last; without determinism "layout" of one

  Task(const char* name, int64_t columns, const at::Tensor& target, int64_t num_rows,
       c10::OptionalArrayRef<int64_t> given_sizes, int64_t ignored, double label_smoothing, c10::string_view group,
       c10::string_view determinism = "run")
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
    layout = is_layout(op, determinism);
    begins = layout ? virtual_begins(op, "the vocabulary", sizes, rank) : std::vector<int64_t>{0, columns};
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
    add(facts.task, task.layout);
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
      (same_sizes
           ? "another target, ignore_index, label_smoothing or determinism than rank 0; they must be the same on all"
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

// Of columns next to each other, from what is known of either part.
RowStats merge(const RowStats& a, const RowStats& b) {
  const double max = b.max > a.max ? b.max : a.max;
  auto scaled = [max](const RowStats& s) {
    return s.sum == 0 ? 0 : s.max == max ? s.sum : s.sum * std::exp(s.max - max);
  };
  return {max, scaled(a) + scaled(b), a.total + b.total};
}

// Along a tree; parts is a power of two of them, and overwritten.
RowStats merge(std::vector<RowStats>& parts) {
  for (size_t num = parts.size(); num > 1; num /= 2) {
    for (size_t i = 0; i < num / 2; ++i) parts[i] = merge(parts[2 * i], parts[2 * i + 1]);
  }
  return parts[0];
}

struct Sums {
  double loss = 0;
  int64_t count = 0;
};

// Rows [first, first + rows of logits) of the task: adds their losses, and writes max and sum of e^(x - max) over the
// whole vocabulary to stats[0] and stats[1] (0 and 1 where the target is ignored). Message: what the ranks send each
// other; for determinism "layout" not rounded, since how many sums are sent depends on the number of ranks.
template <typename T, typename Message>
void add_losses(Sums& sums, T* max_out, T* sum_out, const at::Tensor& logits, const Task& task, int64_t first) {
  const int64_t rows = logits.size(0);
  const int planes = task.smoothing > 0 ? 4 : 3;  // max, sum, the target's logit, the sum of the logits
  constexpr int64_t kFacts = sizeof(Facts) / sizeof(Message);
  at::Tensor mine = at::zeros({1, kFacts + planes * rows}, at::CppTypeToScalarType<Message>::value);
  auto* out = mine.mutable_data_ptr<Message>();
  const Facts facts = Facts::of(task, first, rows);
  std::memcpy(out, &facts, sizeof facts);
  out += kFacts;
  const DType dtype = dtype_of(logits);
  std::vector<RowStats> parts;
  for (int64_t t = 0; t < rows; ++t) {
    if (task.ignores(first + t)) continue;
    parts.clear();
    for (size_t p = 0; p + 1 < task.begins.size(); ++p) {
      const int64_t begin = task.begins[p], num = task.begins[p + 1] - begin;
      parts.push_back(row_stats(row_of(logits, t) + begin * logits.element_size(), num, dtype, planes == 4));
    }
    const RowStats s = merge(parts);
    out[t] = static_cast<Message>(s.max), out[rows + t] = static_cast<Message>(s.sum);
    if (const int64_t v = task.own_column(first + t); v >= 0) {
      const RowStats target = row_stats(row_of(logits, t) + v * logits.element_size(), 1, dtype, true);
      out[2 * rows + t] = static_cast<Message>(target.total);
    }
    if (planes == 4) out[3 * rows + t] = static_cast<Message>(s.total);
  }

  const at::Tensor all = gather(mine, task);
  std::vector<const Message*> of;
  for (int r = 0; r < task.world; ++r) {
    of.push_back(all.const_data_ptr<Message>() + r * all.stride(0));
    check_agreement(Facts::at(all.const_data_ptr()), Facts::at(of.back()), r, task);
    of.back() += kFacts;
  }
  for (int64_t t = 0; t < rows; ++t) {
    max_out[t] = 0, sum_out[t] = 1;
    if (task.ignores(first + t)) continue;
    double max = -kInfinity, sum = 0, total = 0;
    if (task.layout) {
      parts.clear();
      for (const Message* s : of) parts.push_back({s[t], s[rows + t], planes == 4 ? s[3 * rows + t] : 0});
      const RowStats s = merge(parts);
      max = s.max, sum = s.sum, total = s.total;
    }
    for (const Message* s : of) max = s[t] > max ? static_cast<double>(s[t]) : max;
    for (const Message* s : of) {
      if (task.layout) break;
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
    auto* max = stats.mutable_data_ptr<scalar_t>();
    auto* const add = task.layout ? add_losses<scalar_t, double> : add_losses<scalar_t, scalar_t>;
    add(sums, max, max + stats.stride(0), logits, task, first);
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
                                                                   c10::string_view group_name,
                                                                   c10::string_view determinism) {
  constexpr const char* kOp = "vocab_cross_entropy";
  return with_python_errors([&] {
    check_matrix(kOp, "logits", logits, {});
    const Task task(kOp, logits.size(1), target, logits.size(0), sizes, ignore_index, label_smoothing, group_name,
                    determinism);
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
    c10::string_view group_name, c10::string_view determinism) {
  constexpr const char* kOp = "linear_vocab_cross_entropy";
  return with_python_errors([&] {
    check_matrix(kOp, "hidden", hidden, {}), check_matrix(kOp, "weight", weight, hidden);
    Sizes shapes(kOp);
    shapes.last("hidden", hidden, "K"), shapes.last("weight", weight, "K");
    TORCH_CHECK_VALUE(chunk_rows > 0, kOp, ": chunk_rows is ", chunk_rows, ", expected at least 1");
    const int64_t rows = hidden.size(0), columns = weight.size(0);
    const Task task(kOp, columns, target, rows, sizes, ignore_index, label_smoothing, group_name, determinism);
    const auto wide = hidden.options().dtype(wide_type(hidden));
    at::Tensor buffer = at::empty({std::min(chunk_rows, rows), columns}, hidden.options());
    at::Tensor dhidden = at::empty({needs_dhidden ? rows : 0, hidden.size(1)}, task.layout ? wide : hidden.options());
    RowSum how;
    WeightGrad dweight(needs_dweight ? columns : 0, hidden.size(1), hidden.scalar_type());
    Sums sums;
    int64_t first = 0;
    do {  // with no rows, too: the ranks compare what they were asked
      const int64_t num = std::min(chunk_rows, rows - first);
      const at::Tensor x = hidden.narrow(0, first, num);
      at::Tensor logits = buffer.narrow(0, 0, num), stats = at::empty({2, num}, wide);
      if (task.layout) {
        logits.copy_(fixed_mm(x, weight));
      } else {
        mm_into(logits, x, weight, false);
      }
      add_losses(sums, stats, logits, task, first);
      if (needs_dhidden || needs_dweight) write_grads(logits, logits, stats, 1.0, task, first);
      if (needs_dhidden && task.layout) {
        const LayoutShare share(kOp, {logits}, {weight.t()}, at::IntArrayRef(task.sizes), task.group_name);
        dhidden.narrow(0, first, num).copy_(share.sum);
        how = share.how;
      } else if (needs_dhidden) {
        mm_into(dhidden.narrow(0, first, num), logits, weight.t(), false);
      }
      if (needs_dweight) dweight.add(logits, x, task.layout);
      first += num;
    } while (first < rows);
    if (needs_dhidden && task.layout) {
      dhidden = tree_all_reduce(dhidden, how, task.group_name).to(hidden.scalar_type());
    } else if (needs_dhidden) {
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
