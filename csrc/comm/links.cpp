#include "comm/links.h"

#include <algorithm>
#include <cerrno>
#include <stdexcept>

#include <poll.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <unistd.h>

#include "comm/packets.h"

namespace pypar {

namespace {

constexpr uint32_t kMagic = 0x70797061;

bool would_block() {
  return errno == EAGAIN || errno == EWOULDBLOCK || errno == EINTR;
}

}  // namespace

Links::~Links() {
  for (const Connection& c : connections_) close(c.fd);
}

Links::Connection& Links::to(int peer) {
  for (Connection& c : connections_) {
    if (c.peer == peer) return c;
  }
  throw std::runtime_error("rank " + std::to_string(rank_) + " has no link to rank " + std::to_string(peer));
}

Links::Ticket Links::send(int peer, const void* data, int64_t bytes, uint32_t tag) {
  Connection& c = to(peer);
  auto message = std::make_shared<Message>();
  message->tag = tag;
  message->data = static_cast<std::byte*>(const_cast<void*>(data));
  message->bytes = static_cast<size_t>(bytes);
  c.out.push_back({{tag, kMagic, message->bytes}, message});
  push(c);
  return message;
}

Links::Ticket Links::receive(int peer, void* data, int64_t bytes, uint32_t tag) {
  Connection& c = to(peer);
  auto message = std::make_shared<Message>();
  message->tag = tag;
  message->data = static_cast<std::byte*>(data);
  message->bytes = static_cast<size_t>(bytes);
  c.posted.push_back(message);
  return message;
}

// True: something moved.
bool Links::push(Connection& c) {
  bool moved = false;
  while (!c.out.empty() && c.broken.empty()) {
    Outgoing& front = c.out.front();
    Message& m = *front.message;
    iovec parts[2] = {
        {reinterpret_cast<std::byte*>(&front.header) + front.header_moved, sizeof(Header) - front.header_moved},
        {m.data + m.moved, m.bytes - m.moved}};
    msghdr what{};
    what.msg_iov = parts;
    what.msg_iovlen = 2;
    const ssize_t n = sendmsg(c.fd, &what, MSG_NOSIGNAL | MSG_DONTWAIT);
    if (n < 0) {
      if (!would_block()) c.broken = errno_text();
      return moved;
    }
    moved = true;
    const size_t of_header = std::min(static_cast<size_t>(n), parts[0].iov_len);
    front.header_moved += of_header;
    m.moved += static_cast<size_t>(n) - of_header;
    if (front.header_moved < sizeof(Header) || m.moved < m.bytes) continue;
    m.done = true;
    c.out.pop_front();
  }
  return moved;
}

// The receive that the header is for; false: it isn't posted yet.
bool Links::take_header(Connection& c) {
  if (c.header.magic != kMagic) {
    c.broken = "what came is no message of pypar";
    return false;
  }
  const auto wanted =
      std::find_if(c.posted.begin(), c.posted.end(), [&](const auto& message) { return message->tag == c.header.tag; });
  if (wanted == c.posted.end()) return false;
  if ((*wanted)->bytes != c.header.bytes) {
    c.broken = "it sent " + std::to_string(c.header.bytes) + " bytes where this rank expects " +
               std::to_string((*wanted)->bytes);
    return false;
  }
  c.coming = *wanted;
  c.posted.erase(wanted);
  c.header_moved = 0;
  return true;
}

bool Links::pull(Connection& c) {
  bool moved = false;
  while (c.broken.empty()) {
    if (!c.coming && c.header_moved == sizeof(Header) && !take_header(c)) return moved;
    // The rest of a message, and the header behind it in the same call.
    std::byte* data = c.coming ? c.coming->data + c.coming->moved : nullptr;
    const size_t left = c.coming ? c.coming->bytes - c.coming->moved : 0;
    iovec parts[2] = {{data, left},
                      {reinterpret_cast<std::byte*>(&c.header) + c.header_moved, sizeof(Header) - c.header_moved}};
    msghdr what{};
    what.msg_iov = parts;
    what.msg_iovlen = 2;
    const ssize_t n = recvmsg(c.fd, &what, MSG_DONTWAIT);
    if (n < 0) {
      if (!would_block()) c.broken = errno_text();
      return moved;
    }
    if (n == 0) {
      c.broken = "it was closed at the other end";
      return moved;
    }
    moved = true;
    const size_t of_message = std::min(static_cast<size_t>(n), left);
    c.header_moved += static_cast<size_t>(n) - of_message;
    if (!c.coming) continue;
    c.coming->moved += of_message;
    if (of_message < left) continue;
    c.coming->done = true;
    c.coming.reset();
  }
  return moved;
}

bool Links::move() {
  bool moved = false;
  for (Connection& c : connections_) {
    const bool out = push(c), in = pull(c);
    moved = moved || out || in;
    if (c.broken.empty() || (c.out.empty() && c.posted.empty() && !c.coming)) continue;
    throw std::runtime_error("the link to rank " + std::to_string(c.peer) + ": " + c.broken);
  }
  return moved;
}

void Links::progress() {
  move();
}

void Links::wait(const Ticket& message, const Check& check) {
  std::vector<pollfd> ready;
  while (!message->done) {
    if (move()) continue;
    ready.clear();
    for (const Connection& c : connections_) {
      if (!c.broken.empty()) continue;
      // A message that nobody waits for yet would wake this rank again and again.
      const bool held = !c.coming && c.header_moved == sizeof(Header);
      const int events = (held ? 0 : POLLIN) | (c.out.empty() ? 0 : POLLOUT);
      ready.push_back({c.fd, static_cast<short>(events), 0});
    }
    poll(ready.data(), ready.size(), kSliceMs);
    check();
  }
}

void Links::drop() {
  for (Connection& c : connections_) {
    if (c.out.empty() && c.posted.empty() && !c.coming) continue;
    shutdown(c.fd, SHUT_RDWR);
    c.out.clear();
    c.posted.clear();
    c.coming.reset();
  }
}

void Links::cut() {
  for (const Connection& c : connections_) shutdown(c.fd, SHUT_RDWR);
}

}  // namespace pypar
