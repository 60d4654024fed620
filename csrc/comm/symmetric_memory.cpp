// PyTorch's symmetric memory for CPU: torch.distributed._symmetric_memory.empty(..., device="cpu") and rendezvous().
//
// An allocation is one memfd: the buffer, the user's signal pad (zero, as the CUDA one is), and the counters behind
// barrier / put_signal / wait_signal. Those grow and are never reset; a signal has a depth of one, as on CUDA.

#include <array>
#include <map>
#include <mutex>

#include <torch/csrc/distributed/c10d/symm_mem/SymmetricMemory.hpp>

#include "comm/errors.h"
#include "comm/registry.h"
#include "pypar/signal.h"

namespace pypar {

namespace {

namespace symm = c10d::symmetric_memory;

constexpr size_t kPageBytes = 4096;
constexpr int kChannels = 32;
constexpr int kMaxPeers = 64;

size_t pages(size_t bytes) {
  return (bytes + kPageBytes - 1) / kPageBytes * kPageBytes;
}

struct alignas(kCacheLineBytes) Word {
  uint32_t value;
};

// Of one channel, in the memory of the rank that waits: one writer per word.
struct Channel {
  Word barrier;              // written by the owner, polled by all
  Word sent[kMaxPeers];      // written by the sender
  Word consumed[kMaxPeers];  // written by the owner, polled by the sender
};

struct Signals {
  Word sleepers;
  Channel channels[kChannels];
};

struct Allocation {
  explicit Allocation(size_t bytes)
      : requested(bytes),
        buffer_bytes(pages(std::max<size_t>(bytes, 1))),
        pad_bytes(pages(symm::get_signal_pad_size())),
        segment(Segment::create(buffer_bytes + pad_bytes + pages(sizeof(Signals)))) {}
  const size_t requested, buffer_bytes, pad_bytes;
  Segment segment;
};

class CpuSymmetricMemory : public symm::SymmetricMemory {
 public:
  CpuSymmetricMemory(std::shared_ptr<Allocation> allocation, std::shared_ptr<Communicator> communicator)
      : allocation_(std::move(allocation)), communicator_(std::move(communicator)) {
    TORCH_CHECK_VALUE(communicator_->world() <= kMaxPeers, "symmetric memory on CPU takes groups of at most ",
                      kMaxPeers, " ranks, this one has ", communicator_->world());
    Segment& own = allocation_->segment;
    window_ = communicator_->rendezvous(own.fd(), own.data(), own.bytes(), communicator_->default_deadline());
    for (std::byte* base : window_->bases) {
      buffers_.push_back(base);
      pads_.push_back(base + allocation_->buffer_bytes);
    }
    for (int r = 0; r < communicator_->world(); ++r) {
      global_ranks_.push_back(communicator_->mesh().group_ranks[static_cast<size_t>(r)]);
    }
  }

  std::vector<void*> get_buffer_ptrs() override { return buffers_; }
  std::vector<void*> get_signal_pad_ptrs() override { return pads_; }
  // The "device" is the CPU: the device arrays are the host's.
  void** get_buffer_ptrs_dev() override { return buffers_.data(); }
  void** get_signal_pad_ptrs_dev() override { return pads_.data(); }
  size_t get_buffer_size() override { return allocation_->requested; }
  size_t get_offset() override { return 0; }
  bool has_multicast_support() override { return false; }
  void* get_multicast_ptr() override { return nullptr; }
  int get_rank() override { return communicator_->rank(); }
  int get_world_size() override { return communicator_->world(); }
  c10::Device get_device() override { return c10::Device(c10::kCPU); }
  const std::vector<int>& get_rank_to_global_rank() override { return global_ranks_; }
  int* get_rank_to_global_rank_dev() override { return global_ranks_.data(); }
  bool world_within_direct_access() override { return true; }

  void barrier(int channel, size_t timeout_ms) override {
    with_python_errors([&] {
      const int me = get_rank();
      Channel& own = channel_at(me, channel);
      const uint32_t epoch = own.barrier.value + 1;
      notify(own.barrier.value, epoch, signals(me).sleepers.value);
      for (int r = 0; r < get_world_size(); ++r) {
        if (r != me) wait(r, channel_at(r, channel).barrier.value, epoch, r, "barrier", channel, timeout_ms);
      }
    });
  }

  void put_signal(int dst_rank, int channel, size_t timeout_ms) override {
    with_python_errors([&] {
      Channel& theirs = channel_at(dst_rank, channel);
      const auto me = static_cast<size_t>(get_rank());
      // The signal before this one must have been waited for: depth one.
      wait(dst_rank, theirs.consumed[me].value, theirs.sent[me].value, dst_rank, "put_signal", channel, timeout_ms);
      notify(theirs.sent[me].value, theirs.sent[me].value + 1, signals(dst_rank).sleepers.value);
    });
  }

  void wait_signal(int src_rank, int channel, size_t timeout_ms) override {
    with_python_errors([&] {
      const int me = get_rank();
      Channel& own = channel_at(me, channel);
      check_rank(src_rank);
      const auto src = static_cast<size_t>(src_rank);
      const uint32_t target = own.consumed[src].value + 1;
      wait(me, own.sent[src].value, target, src_rank, "wait_signal", channel, timeout_ms);
      notify(own.consumed[src].value, target, signals(me).sleepers.value);
    });
  }

 private:
  void check_rank(int rank) const {
    TORCH_CHECK_VALUE(rank >= 0 && rank < communicator_->world(), "rank ", rank, " is not in [0, ",
                      communicator_->world(), ")");
  }

  Signals& signals(int rank) {
    check_rank(rank);
    return *reinterpret_cast<Signals*>(window_->bases[static_cast<size_t>(rank)] + allocation_->buffer_bytes +
                                       allocation_->pad_bytes);
  }

  Channel& channel_at(int rank, int channel) {
    TORCH_CHECK_VALUE(channel >= 0 && channel < kChannels, "channel ", channel, " is not in [0, ", kChannels, ")");
    return signals(rank).channels[channel];
  }

  // `home`: in whose memory the word lies.
  void wait(int home, uint32_t& word, uint32_t target, int peer, const char* what, int channel, size_t timeout_ms) {
    if (reached(load_acquire(word), target)) return;
    const WithoutGil no_gil;
    const Deadline deadline =
        timeout_ms == 0 ? communicator_->default_deadline() : Deadline::after(std::chrono::milliseconds(timeout_ms));
    pypar::wait_signal(word, target, signals(home).sleepers.value, communicator_->spin_ns(), [&] {
      const std::string text = std::string(what) + " on channel " + std::to_string(channel) + " of symmetric memory";
      communicator_->check_interrupt(text);
      communicator_->check_alive(peer, text, deadline);
    });
  }

  std::shared_ptr<Allocation> allocation_;
  std::shared_ptr<Communicator> communicator_;
  std::shared_ptr<Window> window_;
  std::vector<void*> buffers_, pads_;
  std::vector<int> global_ranks_;
};

class CpuAllocator : public symm::SymmetricMemoryAllocator {
 public:
  void* alloc(size_t size, int /*device_idx*/, const std::optional<std::string>& /*group_name*/) override {
    return with_python_errors([&] {
      auto allocation = std::make_shared<Allocation>(size);
      void* data = allocation->segment.data();
      std::lock_guard<std::mutex> lock(mutex_);
      blocks_[data].allocation = std::move(allocation);
      return data;
    });
  }

  void free(void* ptr) override {
    Block block;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      auto node = blocks_.extract(ptr);
      if (node.empty()) return;
      block = std::move(node.mapped());
    }
    for (auto& [group, entry] : block.handles) {
      if (auto communicator = entry.communicator.lock()) communicator->windows().forget(static_cast<std::byte*>(ptr));
    }
  }

  size_t get_alloc_size(void* ptr) override {
    std::lock_guard<std::mutex> lock(mutex_);
    return find(ptr).allocation->requested;
  }

  c10::intrusive_ptr<symm::SymmetricMemory> rendezvous(void* ptr,
                                                       const std::optional<std::string>& group_name) override {
    TORCH_CHECK_VALUE(group_name.has_value(), "rendezvous of a CPU tensor needs the group: rendezvous(tensor, group)");
    const WithoutGil no_gil;
    return with_python_errors([&]() -> c10::intrusive_ptr<symm::SymmetricMemory> {
      const auto communicator = communicator_of(*group_name);
      std::shared_ptr<Allocation> allocation;
      {
        std::lock_guard<std::mutex> lock(mutex_);
        Block& block = find(ptr);
        auto known = block.handles.find(*group_name);
        if (known != block.handles.end() && known->second.communicator.lock() == communicator)
          return known->second.handle;
        allocation = block.allocation;
      }
      auto handle =
          c10::make_intrusive<CpuSymmetricMemory>(allocation, communicator);  // collective: not under the lock
      std::lock_guard<std::mutex> lock(mutex_);
      find(ptr).handles.insert_or_assign(*group_name, Handle{handle, communicator});
      return handle;
    });
  }

  bool has_multicast_support(int /*device_idx*/) override { return false; }
  c10::DeviceType supported_device_type() override { return c10::DeviceType::CPU; }
  std::string name() override { return "pypar"; }
  bool has_allocation(void* ptr) override {
    std::lock_guard<std::mutex> lock(mutex_);
    return blocks_.count(ptr) != 0;
  }

 private:
  struct Handle {
    c10::intrusive_ptr<CpuSymmetricMemory> handle;
    std::weak_ptr<Communicator> communicator;
  };
  struct Block {
    std::shared_ptr<Allocation> allocation;
    std::map<std::string, Handle> handles;
  };

  Block& find(void* ptr) {
    auto block = blocks_.find(ptr);
    TORCH_CHECK_VALUE(
        block != blocks_.end(),
        "this tensor is not in symmetric memory; allocate it with torch.distributed._symmetric_memory.empty");
    return block->second;
  }

  std::mutex mutex_;
  std::map<void*, Block> blocks_;
};

// At import, as design.md says; before any group exists.
[[maybe_unused]] const bool registered = [] {
  symm::register_allocator(c10::DeviceType::CPU, c10::make_intrusive<CpuAllocator>());
  return true;
}();

}  // namespace

}  // namespace pypar
