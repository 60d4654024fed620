// How ranks of one host find each other and map each other's memory.
//
// memfd passed with SCM_RIGHTS over abstract Unix sockets: nothing has a name in a file system, so nothing is left when
// a rank is killed, and another user can't open it (the socket checks the peer's uid, a random token is asked for).
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

namespace pypar {

// The two calls of a key-value store that the bootstrap needs; get() waits for the key.
struct KeyValue {
  std::function<void(const std::string&, const std::string&)> set;
  std::function<std::string(const std::string&)> get;
};

// memfd + mapping. Sealed against resizing, so that a mapping can never end early.
class Segment {
 public:
  static Segment create(size_t bytes);
  static Segment map(int fd, size_t bytes);  // takes fd
  Segment() = default;
  Segment(Segment&&) noexcept;
  Segment& operator=(Segment&&) noexcept;
  ~Segment();
  std::byte* data() const { return data_; }
  size_t bytes() const { return bytes_; }
  int fd() const { return fd_; }

 private:
  std::byte* data_ = nullptr;
  size_t bytes_ = 0;
  int fd_ = -1;
};

// The fully connected ranks of one group on one host.
struct Mesh {
  std::string name;
  int rank = 0;  // among the ranks of this mesh
  int world = 1;
  std::vector<int> group_ranks;  // rank of the mesh -> rank of the group; behind them, the group's other ranks
  std::vector<std::shared_ptr<Segment>> segments;  // by rank, own one included; shared when the ranks are threads
  std::vector<std::byte*> bases;                   // by rank
  std::vector<int> sockets;                        // SOCK_SEQPACKET to each peer, -1 at own rank
  std::vector<int> pidfds;                         // -1 where the kernel can't say
  std::vector<int> pids;
  int num_cores = 1;  // that the ranks of this mesh may use together
  // All ranks of the group, host by host: which ranks share memory. The same on every rank.
  std::vector<std::vector<int>> hosts;

  Mesh() = default;
  ~Mesh();
  // Collective over the group. `segment_bytes`: of each rank's control segment for a host of n ranks.
  static std::unique_ptr<Mesh> connect(const std::string& name, int rank, int world, KeyValue store,
                                       const std::function<size_t(int)>& segment_bytes, uint64_t timeout_ms);
  // W ranks as threads of one process (tests, sanitizers): the meshes share the segments.
  static std::vector<std::unique_ptr<Mesh>> in_process(int world, size_t segment_bytes);

  // Collective over the mesh: everybody gives one fd and 8 bytes and gets everybody's. Closes nothing of its own.
  std::vector<std::pair<int, uint64_t>> exchange_fds(int fd, uint64_t value, uint64_t timeout_ms);
  // Ranks whose process is gone, by pidfd or socket.
  bool alive(int peer) const;
};

}  // namespace pypar
