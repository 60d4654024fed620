#include <cerrno>
#include <cstring>
#include <utility>

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include "comm/bootstrap.h"
#include "comm/types.h"

namespace pypar {

namespace {

constexpr size_t kHugePageBytes = 2u << 20;

std::byte* map_shared(int fd, size_t bytes) {
  void* data = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  if (data == MAP_FAILED) {
    throw PeerError("can't map " + std::to_string(bytes) + " bytes of shared memory: " + std::strerror(errno) +
                    "; free memory or raise the limit of this process (ulimit -v)");
  }
  // Granted only where /sys/kernel/mm/transparent_hugepage/shmem_enabled says "advise" or more; harmless elsewhere.
  if (bytes >= kHugePageBytes) madvise(data, bytes, MADV_HUGEPAGE);
  return static_cast<std::byte*>(data);
}

}  // namespace

Segment Segment::create(size_t bytes) {
  Segment s;
  s.fd_ = memfd_create("pypar", MFD_CLOEXEC | MFD_ALLOW_SEALING);
  if (s.fd_ < 0) throw PeerError(std::string("memfd_create failed: ") + std::strerror(errno));
  if (ftruncate(s.fd_, static_cast<off_t>(bytes)) != 0) {
    throw PeerError("can't size shared memory to " + std::to_string(bytes) + " bytes: " + std::strerror(errno));
  }
  fcntl(s.fd_, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL);
  s.bytes_ = bytes;
  s.data_ = map_shared(s.fd_, bytes);
  return s;
}

Segment Segment::map(int fd, size_t bytes) {
  Segment s;
  s.fd_ = fd;
  s.bytes_ = bytes;
  const off_t size = lseek(fd, 0, SEEK_END);
  if (size < static_cast<off_t>(bytes)) {
    throw PeerError("a peer's shared memory holds " + std::to_string(size) + " bytes where " + std::to_string(bytes) +
                    " were announced; do all ranks run the same version of pypar?");
  }
  s.data_ = map_shared(fd, bytes);
  return s;
}

Segment::Segment(Segment&& other) noexcept {
  *this = std::move(other);
}

Segment& Segment::operator=(Segment&& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(bytes_, other.bytes_);
  std::swap(fd_, other.fd_);
  return *this;
}

Segment::~Segment() {
  if (data_ != nullptr) munmap(data_, bytes_);
  if (fd_ >= 0) close(fd_);
}

}  // namespace pypar
