// One tensor of a whole host: parts, each in memory that one rank gave, next to each other at one address.
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

  void place(int fd, size_t offset, size_t at, size_t bytes) {
    if (mmap(data_ + at, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, fd, static_cast<off_t>(offset)) ==
        MAP_FAILED) {
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

at::Tensor contiguous_parts(const std::string& group_name, const std::vector<int64_t>& owners,
                            const std::vector<int64_t>& bytes) {
  return with_python_errors([&] {
    const auto communicator = communicator_of(group_name);
    const int64_t world = communicator->world();
    TORCH_CHECK_VALUE(owners.size() == bytes.size(), "contiguous_parts: ", bytes.size(), " parts, ", owners.size(),
                      " owners");
    std::vector<int64_t> given(static_cast<size_t>(world), 0);  // by rank
    for (size_t i = 0; i < bytes.size(); ++i) {
      TORCH_CHECK_VALUE(owners[i] >= 0 && owners[i] < world, "contiguous_parts: part ", i, " is of rank ", owners[i],
                        "; the group has ", world, " ranks");
      TORCH_CHECK_VALUE(bytes[i] >= 0 && bytes[i] % kPageBytes == 0, "contiguous_parts: a part of ", bytes[i],
                        " bytes isn't whole pages of ", kPageBytes);
      given[static_cast<size_t>(owners[i])] += bytes[i];
    }
    const int64_t total = std::accumulate(bytes.begin(), bytes.end(), int64_t{0});
    const auto options = at::TensorOptions().dtype(at::kByte);
    if (total == 0) return at::empty({0}, options);
    const auto mine = static_cast<size_t>(given[static_cast<size_t>(communicator->rank())]);
    const Segment own = Segment::create(std::max<size_t>(mine, kPageBytes));
    const auto theirs = communicator->exchange_memory(own.fd(), given, communicator->default_deadline());
    auto reserved = std::make_shared<Reserved>(static_cast<size_t>(total));
    std::vector<size_t> used(static_cast<size_t>(world), 0);
    size_t at = 0;
    for (size_t i = 0; i < bytes.size(); ++i) {
      const auto r = static_cast<size_t>(owners[i]), size = static_cast<size_t>(bytes[i]);
      const int fd = static_cast<int>(r) == communicator->rank() ? own.fd() : theirs[r].fd();
      // The mapping keeps the memory, the descriptors are closed.
      if (size != 0) reserved->place(fd, used[r], at, size);
      used[r] += size;
      at += size;
    }
    return at::from_blob(reserved->data(), {total}, [reserved](void*) {}, options);
  });
}

void give_back_pages(const at::Tensor& part) {
  const auto begin = reinterpret_cast<uintptr_t>(part.data_ptr());
  const size_t bytes = part.nbytes();
  TORCH_CHECK_VALUE(part.is_contiguous() && begin % kPageBytes == 0 && bytes % kPageBytes == 0,
                    "give_back_pages: not whole pages of ", kPageBytes, " bytes");
  // A hole in the memfd: the pages go for every rank that maps them, and read as zeros until they are written again.
  TORCH_CHECK(bytes == 0 || madvise(part.data_ptr(), bytes, MADV_REMOVE) == 0, "can't give back ", bytes,
              " bytes of shared memory: ", std::strerror(errno));
}

}  // namespace pypar
