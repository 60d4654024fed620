// Bytes between this rank and ranks of other hosts: one TCP connection to each, and no thread. Whoever waits moves
// them; in between, the kernel does, as far as its buffers go, without taking a core from a matmul for a switch of
// threads.
#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include <torch/csrc/distributed/c10d/Store.hpp>

namespace pypar {

class Links {
 public:
  // Called between slices of a wait: throws what shall end it.
  using Check = std::function<void()>;
  static constexpr int kSliceMs = 50;

  // Collective over this rank and its `peers` (ranks of the group), each of which names the other. The address is that
  // of the interface that GLOO_SOCKET_IFNAME names, else the host's name's, else the loopback's, as gloo does it.
  // Throws std::runtime_error when a connection can't be made.
  Links(c10d::Store& store, int rank, const std::vector<int>& peers, const Check& check);
  ~Links();
  Links(const Links&) = delete;
  Links& operator=(const Links&) = delete;

  // One message; done: its memory is free again (sent), or holds the bytes (received).
  struct Message {
    uint32_t tag = 0;
    std::byte* data = nullptr;
    size_t bytes = 0, moved = 0;
    bool done = false;
  };
  using Ticket = std::shared_ptr<const Message>;

  // bytes: above 0. The memory must stay until the message is done. Messages of a tag come in the order in which they
  // were sent; one for which no receive was posted holds up those behind it.
  Ticket send(int peer, const void* data, int64_t bytes, uint32_t tag);
  Ticket receive(int peer, void* data, int64_t bytes, uint32_t tag);
  // Moves what can be moved without waiting. Throws std::runtime_error when a connection is broken.
  void progress();
  void wait(const Ticket& message, const Check& check);

  // Forgets all messages that aren't done, and closes their connections: their memory goes away.
  void drop();
  // From any thread: ends every wait, here and at the other ends.
  void cut();

 private:
  struct Header {
    uint32_t tag;
    uint32_t magic;
    uint64_t bytes;
  };
  struct Outgoing {
    Header header;
    std::shared_ptr<Message> message;
    size_t header_moved = 0;
  };
  struct Connection {
    int peer = -1;
    int fd = -1;
    std::deque<Outgoing> out;
    std::deque<std::shared_ptr<Message>> posted;
    std::shared_ptr<Message> coming;  // its header has come
    Header header{};
    size_t header_moved = 0;
    std::string broken;  // why nothing moves any more; no fault as long as nothing has to
  };

  Connection& to(int peer);
  bool push(Connection& c);
  bool pull(Connection& c);
  bool take_header(Connection& c);
  // Both directions of all connections; true: something moved. Throws where what has to move can't.
  bool move();

  const int rank_;
  std::vector<Connection> connections_;
};

}  // namespace pypar
