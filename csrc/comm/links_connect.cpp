// How the links come to be: an address and a number in the store, a connection, a hello.
#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <sstream>
#include <stdexcept>
#include <thread>
#include <utility>

#include <arpa/inet.h>
#include <ifaddrs.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <unistd.h>

#include "comm/links.h"
#include "comm/packets.h"

namespace pypar {

namespace {

constexpr auto kLook = std::chrono::milliseconds(2);  // at the store, until all peers have written there
constexpr int kBufferBytes = 8 << 20;

struct Fd {
  int fd = -1;
  explicit Fd(int fd) : fd(fd) {}
  Fd(Fd&& other) noexcept : fd(std::exchange(other.fd, -1)) {}
  Fd& operator=(Fd&& other) noexcept {
    std::swap(fd, other.fd);
    return *this;
  }
  ~Fd() {
    if (fd >= 0) close(fd);
  }
  int release() { return std::exchange(fd, -1); }
};

struct Address {
  sockaddr_storage storage{};
  socklen_t size = 0;
  sockaddr* get() { return reinterpret_cast<sockaddr*>(&storage); }
};

Address address_of(const sockaddr* from) {
  Address a;
  a.size = from->sa_family == AF_INET ? sizeof(sockaddr_in) : sizeof(sockaddr_in6);
  std::memcpy(&a.storage, from, a.size);
  return a;
}

void set_port(Address& a, uint16_t port) {
  if (a.storage.ss_family == AF_INET) {
    reinterpret_cast<sockaddr_in*>(&a.storage)->sin_port = htons(port);
  } else {
    reinterpret_cast<sockaddr_in6*>(&a.storage)->sin6_port = htons(port);
  }
}

// A socket that listens there; -1: this host has no such address.
int listen_at(Address& a, int backlog) {
  Fd listener(socket(a.storage.ss_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
  set_port(a, 0);
  if (listener.fd < 0 || bind(listener.fd, a.get(), a.size) != 0 || listen(listener.fd, backlog) != 0) return -1;
  if (getsockname(listener.fd, a.get(), &a.size) != 0) return -1;
  return listener.release();
}

bool usable(const sockaddr* a) {
  if (a == nullptr || (a->sa_family != AF_INET && a->sa_family != AF_INET6)) return false;
  return a->sa_family == AF_INET || !IN6_IS_ADDR_LINKLOCAL(&reinterpret_cast<const sockaddr_in6*>(a)->sin6_addr);
}

std::vector<Address> of_interface(const std::string& name) {
  std::vector<Address> found;
  ifaddrs* all = nullptr;
  if (getifaddrs(&all) != 0) return found;
  for (const ifaddrs* i = all; i != nullptr; i = i->ifa_next) {
    if (name == i->ifa_name && usable(i->ifa_addr)) found.push_back(address_of(i->ifa_addr));
  }
  freeifaddrs(all);
  return found;
}

std::vector<Address> of_host_name() {
  std::vector<Address> found;
  char name[256] = {};
  addrinfo hints{}, *all = nullptr;
  hints.ai_socktype = SOCK_STREAM;
  if (gethostname(name, sizeof name - 1) != 0 || getaddrinfo(name, nullptr, &hints, &all) != 0) return found;
  for (const addrinfo* i = all; i != nullptr; i = i->ai_next) {
    if (usable(i->ai_addr)) found.push_back(address_of(i->ai_addr));
  }
  freeaddrinfo(all);
  return found;
}

Address loopback() {
  sockaddr_in a{};
  a.sin_family = AF_INET;
  a.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  return address_of(reinterpret_cast<sockaddr*>(&a));
}

// A socket that listens, and where.
std::pair<Fd, Address> listen_here(int backlog) {
  std::vector<Address> candidates;
  const char* named = std::getenv("GLOO_SOCKET_IFNAME");
  if (named != nullptr && *named != 0) {
    const std::string name = std::string(named).substr(0, std::string(named).find(','));
    candidates = of_interface(name);
    if (candidates.empty()) {
      throw std::runtime_error("GLOO_SOCKET_IFNAME is '" + name +
                               "', and this host has no interface of that name with "
                               "an address; `ip address` lists them");
    }
  } else {
    candidates = of_host_name();
    candidates.push_back(loopback());
  }
  for (Address& a : candidates) {
    const int fd = listen_at(a, backlog);
    if (fd >= 0) return {Fd(fd), a};
  }
  throw std::runtime_error("no address of this host can be listened at: " + errno_text());
}

std::string key_of(int rank) {
  return "pypar/links/" + std::to_string(rank);
}

uint64_t random_number() {
  uint64_t number = 0;
  if (getrandom(&number, sizeof number, 0) != sizeof number) {
    throw std::runtime_error("getrandom failed: " + errno_text());
  }
  return number;
}

// What a rank writes to the store, for those that connect to it.
std::string encode(const Address& a, uint64_t token) {
  const auto* bytes = reinterpret_cast<const unsigned char*>(&a.storage);
  std::ostringstream text;
  text << token << ' ' << a.size;
  for (socklen_t i = 0; i < a.size; ++i) text << ' ' << static_cast<int>(bytes[i]);
  return text.str();
}

std::pair<Address, uint64_t> decode(const std::string& text) {
  std::istringstream in(text);
  Address a;
  uint64_t token = 0;
  in >> token >> a.size;
  a.size = std::min<socklen_t>(a.size, sizeof a.storage);
  for (socklen_t i = 0, byte = 0; i < a.size && in >> byte; ++i) {
    reinterpret_cast<unsigned char*>(&a.storage)[i] = static_cast<unsigned char>(byte);
  }
  return {a, token};
}

// What the one that connects says first.
struct Hello {
  uint64_t token;
  int64_t rank;
};

// Waits until the socket is ready for `events`.
void await(int fd, short events, const Links::Check& check) {
  pollfd ready{fd, events, 0};
  while (poll(&ready, 1, Links::kSliceMs) <= 0) check();
}

Fd connect_to(int peer, const std::string& text, int rank, const Links::Check& check) {
  auto [address, token] = decode(text);
  Fd link(socket(address.storage.ss_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
  const std::string what = "can't connect to rank " + std::to_string(peer) + ": ";
  if (link.fd < 0) throw std::runtime_error(what + errno_text());
  if (connect(link.fd, address.get(), address.size) != 0) {
    if (errno != EINPROGRESS) throw std::runtime_error(what + errno_text());
    await(link.fd, POLLOUT, check);
    int error = 0;
    socklen_t size = sizeof error;
    getsockopt(link.fd, SOL_SOCKET, SO_ERROR, &error, &size);
    if (error != 0) {
      throw std::runtime_error(what + std::strerror(error) + "; GLOO_SOCKET_IFNAME names the interface to use");
    }
  }
  const Hello hello{token, rank};  // fits the buffer of a connection that is new
  if (::send(link.fd, &hello, sizeof hello, MSG_NOSIGNAL) != sizeof hello)
    throw std::runtime_error(what + errno_text());
  return link;
}

bool would_block() {
  return errno == EAGAIN || errno == EWOULDBLOCK || errno == EINTR;
}

// The connections of `num` ranks that know the token. A stranger is sent away; one that says nothing holds up nobody.
std::vector<std::pair<Fd, int>> accept_all(int listener, uint64_t token, size_t num, const Links::Check& check) {
  struct Caller {
    Fd link;
    Hello hello{};
    size_t got = 0;
  };
  std::vector<Caller> callers;
  std::vector<std::pair<Fd, int>> known;
  while (known.size() < num) {
    std::vector<pollfd> ready{{listener, POLLIN, 0}};
    for (const Caller& c : callers) ready.push_back({c.link.fd, POLLIN, 0});
    poll(ready.data(), ready.size(), Links::kSliceMs);
    check();
    for (size_t i = callers.size(); i-- > 0;) {
      if (ready[i + 1].revents == 0) continue;
      Caller& c = callers[i];
      const ssize_t n = recv(c.link.fd, reinterpret_cast<std::byte*>(&c.hello) + c.got, sizeof(Hello) - c.got, 0);
      if (n < 0 && would_block()) continue;
      if (n > 0) c.got += static_cast<size_t>(n);
      if (n > 0 && c.got < sizeof(Hello)) continue;
      if (c.got == sizeof(Hello) && c.hello.token == token) {
        known.emplace_back(std::move(c.link), static_cast<int>(c.hello.rank));
      }
      callers.erase(callers.begin() + static_cast<std::ptrdiff_t>(i));
    }
    if (ready[0].revents == 0) continue;
    Fd link(accept4(listener, nullptr, nullptr, SOCK_CLOEXEC | SOCK_NONBLOCK));
    if (link.fd >= 0) callers.push_back({std::move(link)});
  }
  return known;
}

// Large enough that a chunk travels while the next one is multiplied; where this user may not ask, the kernel's choice.
void set_options(int fd) {
  const int on = 1, bytes = kBufferBytes;
  setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
  setsockopt(fd, SOL_SOCKET, SO_SNDBUFFORCE, &bytes, sizeof bytes);
  setsockopt(fd, SOL_SOCKET, SO_RCVBUFFORCE, &bytes, sizeof bytes);
}

}  // namespace

Links::Links(c10d::Store& store, int rank, const std::vector<int>& peers, const Check& check) : rank_(rank) {
  auto [listener, address] = listen_here(static_cast<int>(peers.size()) + 1);
  const uint64_t token = random_number();
  const std::string own = encode(address, token);
  store.set(key_of(rank), std::vector<uint8_t>(own.begin(), own.end()));
  std::vector<std::pair<Fd, int>> made;  // closed again where another can't be made
  size_t to_come = 0;
  for (int peer : peers) {
    if (peer > rank) {
      ++to_come;
      continue;
    }
    while (!store.check({key_of(peer)})) {
      check();
      std::this_thread::sleep_for(kLook);
    }
    const auto text = store.get(key_of(peer));
    made.emplace_back(connect_to(peer, std::string(text.begin(), text.end()), rank, check), peer);
  }
  for (auto& link : accept_all(listener.fd, token, to_come, check)) made.push_back(std::move(link));
  connections_.reserve(made.size());
  for (auto& [link, peer] : made) {
    set_options(link.fd);
    connections_.emplace_back().peer = peer;
    connections_.back().fd = link.release();
  }
}

}  // namespace pypar
