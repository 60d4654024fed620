#include "comm/packets.h"

#include <algorithm>
#include <cerrno>
#include <cstddef>
#include <cstring>

#include <poll.h>
#include <unistd.h>

#include "comm/interrupt.h"
#include "comm/types.h"
#include "pypar/signal.h"

namespace pypar {

std::string errno_text() {
  return std::strerror(errno);
}

sockaddr_un abstract_address(const std::string& name, socklen_t& length) {
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  std::memcpy(address.sun_path + 1, name.data(), name.size());
  length = static_cast<socklen_t>(offsetof(sockaddr_un, sun_path) + 1 + name.size());
  return address;
}

void send_packet(int socket, const Packet& packet, int fd) {
  iovec data{const_cast<Packet*>(&packet), sizeof packet};
  alignas(cmsghdr) char control[CMSG_SPACE(sizeof(int))] = {};
  msghdr message{};
  message.msg_iov = &data;
  message.msg_iovlen = 1;
  if (fd >= 0) {
    message.msg_control = control;
    message.msg_controllen = sizeof control;
    cmsghdr* header = CMSG_FIRSTHDR(&message);
    header->cmsg_level = SOL_SOCKET;
    header->cmsg_type = SCM_RIGHTS;
    header->cmsg_len = CMSG_LEN(sizeof(int));
    std::memcpy(CMSG_DATA(header), &fd, sizeof fd);
  }
  while (sendmsg(socket, &message, MSG_NOSIGNAL) < 0) {
    if (errno != EINTR) throw PeerError("can't hand shared memory to a peer: " + errno_text());
  }
}

void wait_readable(int socket, uint64_t until_ns, const std::string& whom) {
  for (;;) {
    const uint64_t now = now_ns();
    if (now >= until_ns) throw PeerError("timed out while connecting to " + whom + "; is it running?");
    pollfd p{socket, POLLIN, 0};
    const int ready = poll(&p, 1, static_cast<int>(std::min<uint64_t>((until_ns - now) / 1000000 + 1, 20)));
    if (ready > 0) return;
    if (ready < 0 && errno != EINTR) throw PeerError("poll failed: " + errno_text());
    check_interrupt([&] { return "this rank was interrupted while it connected to " + whom; });
  }
}

std::pair<Packet, int> receive_packet(int socket, uint64_t until_ns, const std::string& whom) {
  wait_readable(socket, until_ns, whom);
  Packet packet;
  iovec data{&packet, sizeof packet};
  alignas(cmsghdr) char control[CMSG_SPACE(sizeof(int))] = {};
  msghdr message{};
  message.msg_iov = &data;
  message.msg_iovlen = 1;
  message.msg_control = control;
  message.msg_controllen = sizeof control;
  const ssize_t got = recvmsg(socket, &message, MSG_CMSG_CLOEXEC);
  if (got != sizeof packet || packet.magic != kHelloMagic) {
    throw PeerError(whom + (got == 0 ? " died while the ranks connected" : " sent something that isn't pypar's"));
  }
  int fd = -1;
  for (cmsghdr* h = CMSG_FIRSTHDR(&message); h != nullptr; h = CMSG_NXTHDR(&message, h)) {
    if (h->cmsg_level == SOL_SOCKET && h->cmsg_type == SCM_RIGHTS) std::memcpy(&fd, CMSG_DATA(h), sizeof fd);
  }
  return {packet, fd};
}

}  // namespace pypar
