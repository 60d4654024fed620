// Packets between ranks of one host that meet over an abstract Unix socket: three words and perhaps a file descriptor.
// Internal to comm/.
#pragma once

#include <cstdint>
#include <string>
#include <utility>

#include <sys/socket.h>
#include <sys/un.h>

namespace pypar {

inline constexpr uint64_t kHelloMagic = 0x7061727079703031ull;

struct Packet {
  uint64_t magic = kHelloMagic;
  uint64_t rank = 0;
  uint64_t value = 0;
};

std::string errno_text();
// A leading zero byte: no name in the file system.
sockaddr_un abstract_address(const std::string& name, socklen_t& length);
// fd: -1 for none.
void send_packet(int socket, const Packet& packet, int fd);
// Returns the packet and the fd that came with it (-1: none). whom: for messages.
std::pair<Packet, int> receive_packet(int socket, uint64_t until_ns, const std::string& whom);
void wait_readable(int socket, uint64_t until_ns, const std::string& whom);

}  // namespace pypar
