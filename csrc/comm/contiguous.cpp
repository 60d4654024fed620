// One tensor of a whole host: the ranks' shards, each in memory that its rank gave, next to each other at one address.
//
// So a parameter that is cut over the ranks is still an ordinary contiguous tensor on each of them, and exists once.

#include <cerrno>
#include <cstring>
#include <numeric>

#include <sys/mman.h>

#include "comm/contiguous.h"
#include "comm/errors.h"
#include "comm/registry.h"

namespace pypar {

namespace {

constexpr int64_t kPageBytes = 4096;

// Addresses that nothing else gets, given back as a whole.
class Reserved {
 public:
  explicit Reserved(size_t bytes) : bytes_(bytes) {
    void* data = mmap(nullptr, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (data == MAP_FAILED) throw PeerError("can't reserve " + std::to_string(bytes) + " bytes: " + reason());
    data_ = static_cast<std::byte*>(data);
  }
  Reserved(const Reserved&) = delete;
  ~Reserved() { munmap(data_, bytes_); }

  void place(int fd, size_t at, size_t bytes) {
    if (mmap(data_ + at, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, fd, 0) == MAP_FAILED) {
      throw PeerError("can't map " + std::to_string(bytes) + " bytes of shared memory: " + reason());
    }
  }
  std::byte* data() const { return data_; }

 private:
  static std::string reason() {
    return std::string(std::strerror(errno)) + "; free memory or raise the limit of this process (ulimit -v)";
  }
  std::byte* data_ = nullptr;
  size_t bytes_;
};

}  // namespace

at::Tensor contiguous_shards(const std::string& group_name, const std::vector<int64_t>& shard_bytes) {
  return with_python_errors([&] {
    const auto communicator = communicator_of(group_name);
    const auto world = static_cast<size_t>(communicator->world());
    TORCH_CHECK_VALUE(shard_bytes.size() == world, "contiguous_shards: ", shard_bytes.size(), " shards for ", world,
                      " ranks");
    for (int64_t bytes : shard_bytes) {
      TORCH_CHECK_VALUE(bytes >= 0 && bytes % kPageBytes == 0, "contiguous_shards: a shard of ", bytes,
                        " bytes isn't whole pages of ", kPageBytes);
    }
    const int64_t total = std::accumulate(shard_bytes.begin(), shard_bytes.end(), int64_t{0});
    const auto options = at::TensorOptions().dtype(at::kByte);
    if (total == 0) return at::empty({0}, options);
    const auto mine = static_cast<size_t>(shard_bytes[static_cast<size_t>(communicator->rank())]);
    const Segment own = Segment::create(std::max<size_t>(mine, kPageBytes));
    const auto theirs = communicator->exchange_memory(own.fd(), shard_bytes, communicator->default_deadline());
    auto reserved = std::make_shared<Reserved>(static_cast<size_t>(total));
    size_t at = 0;
    for (size_t r = 0; r < world; ++r) {
      const auto bytes = static_cast<size_t>(shard_bytes[r]);
      const int fd = static_cast<int>(r) == communicator->rank() ? own.fd() : theirs[r].fd();
      if (bytes != 0) reserved->place(fd, at, bytes);  // the mapping keeps the memory, the descriptors are closed
      at += bytes;
    }
    return at::from_blob(reserved->data(), {total}, [reserved](void*) {}, options);
  });
}

}  // namespace pypar
