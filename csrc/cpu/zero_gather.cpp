// Shards to the full parameters, in place. The asynchronous form is the process group's own: pypar/ops/zero_gather.py.

#include <algorithm>
#include <numeric>

#include <torch/library.h>

#include "cpu/tensors.h"

namespace pypar {

namespace {

constexpr const char* kOp = "zero_gather";

// Neither shared memory nor "pypar": the group's all_gather, which takes equal parts, so that uneven ones are padded.
void gather_over_group(c10d::ProcessGroup& group, at::Tensor& full, const at::Tensor& shard, at::IntArrayRef sizes) {
  const int64_t most = *std::max_element(sizes.begin(), sizes.end());
  if (most == 0) return;
  at::Tensor mine = shard.contiguous();
  if (std::all_of(sizes.begin(), sizes.end(), [&](int64_t size) { return size == most; })) {
    group._allgather_base(full, mine)->wait();
    return;
  }
  at::Tensor padded = at::zeros({most}, shard.options());
  padded.narrow(0, 0, shard.numel()).copy_(mine);
  at::Tensor all = at::empty({most * group.getSize()}, shard.options());
  group._allgather_base(all, padded)->wait();
  int64_t begin = 0;
  for (size_t r = 0; r < sizes.size(); ++r) {
    full.narrow(0, begin, sizes[r]).copy_(all.narrow(0, static_cast<int64_t>(r) * most, sizes[r]));
    begin += sizes[r];
  }
}

void zero_gather(at::Tensor& full, const at::Tensor& shard, at::IntArrayRef sizes, c10::string_view group_name) {
  with_python_errors([&] {
    check_cpu_tensor(kOp, "full", full), check_cpu_tensor(kOp, "shard", shard);
    const std::string name(group_name);
    const auto group = process_group_of(name);
    const int world = group->getSize(), rank = group->getRank();
    const int64_t total = std::accumulate(sizes.begin(), sizes.end(), int64_t{0});
    TORCH_CHECK_VALUE(static_cast<int>(sizes.size()) == world && full.dim() == 1 && full.size(0) == total &&
                          std::all_of(sizes.begin(), sizes.end(), [](int64_t size) { return size >= 0; }),
                      kOp, ": sizes ", sizes, " don't cut full ", full.sizes(), " for ", world, " ranks");
    const auto type = full.scalar_type();
    TORCH_CHECK_VALUE(full.is_contiguous() && at::isFloatingType(type), kOp, ": full is ", type,
                      full.is_contiguous() ? "" : ", not contiguous", "; expected a contiguous floating type");
    TORCH_CHECK_VALUE(
        shard.scalar_type() == type && shard.dim() == 1 && shard.numel() == sizes[static_cast<size_t>(rank)], kOp,
        ": shard is ", shard.scalar_type(), shard.sizes(), ", expected ", type, "[", sizes[static_cast<size_t>(rank)],
        "] on rank ", rank);
    const auto communicator = find_communicator(name);
    const auto hosts = communicator == nullptr ? find_hosts(name) : nullptr;
    if (communicator == nullptr && hosts == nullptr) return gather_over_group(*group, full, shard, sizes);
    const at::Tensor mine = shard.contiguous();
    std::vector<int64_t> bytes;
    std::vector<void*> outs;
    auto* data = static_cast<std::byte*>(full.mutable_data_ptr());
    for (int64_t size : sizes) {
      outs.push_back(data);
      bytes.push_back(size * full.element_size());
      data += bytes.back();
    }
    if (hosts != nullptr) {
      hosts->run([&](Deadline deadline) { hosts->all_gather(mine.const_data_ptr(), bytes, outs.data(), deadline); });
    } else {
      communicator->all_gather(mine.const_data_ptr(), bytes.data(), outs.data(), communicator->default_deadline(),
                               dtype_of(mine));
    }
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(pypar, CPU, m) {
  m.impl("zero_gather", zero_gather);
}

}  // namespace pypar
