#include <torch/library.h>

#include "cpu/tensors.h"

namespace pypar {

namespace {

void broadcast_(at::Tensor& x, int64_t root, c10::string_view group_name) {
  with_python_errors([&] {
    check_cpu_tensor("broadcast", "x", x);
    const auto communicator = find_communicator(std::string(group_name));
    const auto group = communicator == nullptr ? process_group_of(std::string(group_name)) : nullptr;
    const int world = communicator != nullptr ? communicator->world() : group->getSize();
    TORCH_CHECK_VALUE(root >= 0 && root < world, "broadcast: root ", root, " is not a rank of the group, [0, ", world,
                      ")");
    at::Tensor dense = x.contiguous();
    if (communicator == nullptr) {
      std::vector<at::Tensor> tensors{dense};
      c10d::BroadcastOptions options;
      options.rootRank = root;
      group->broadcast(tensors, options)->wait();
    } else {
      communicator->broadcast(dense.mutable_data_ptr(), static_cast<int64_t>(dense.nbytes()), static_cast<int>(root),
                              communicator->default_deadline(), dtype_of(x));
    }
    if (!dense.is_same(x)) x.copy_(dense);
  });
}

at::Tensor broadcast(const at::Tensor& x, int64_t root, c10::string_view group_name) {
  at::Tensor out = x.clone(at::MemoryFormat::Contiguous);
  broadcast_(out, root, group_name);
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(pypar, CPU, m) {
  m.impl("broadcast", broadcast);
  m.impl("broadcast_", broadcast_);
}

}  // namespace pypar
