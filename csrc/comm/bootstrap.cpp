#include "comm/bootstrap.h"

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <sstream>
#include <utility>

#include <poll.h>
#include <sched.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <unistd.h>

#include "comm/packets.h"
#include "comm/types.h"
#include "pypar/signal.h"

namespace pypar {

namespace {

constexpr size_t kProbeBytes = 4096;

std::string random_hex() {
  uint64_t words[2];
  if (getrandom(words, sizeof words, 0) != sizeof words) throw PeerError("getrandom failed: " + errno_text());
  char text[33];
  snprintf(text, sizeof text, "%016lx%016lx", words[0], words[1]);
  return text;
}

struct Address {
  std::string socket_name, node_id;
  std::vector<uint64_t> cores;
};

std::vector<uint64_t> own_cores() {
  cpu_set_t set;
  CPU_ZERO(&set);
  std::vector<uint64_t> words(CPU_SETSIZE / 64, 0);
  if (sched_getaffinity(0, sizeof set, &set) == 0) {
    for (int i = 0; i < CPU_SETSIZE; ++i) {
      if (CPU_ISSET(i, &set)) words[static_cast<size_t>(i / 64)] |= 1ull << (i % 64);
    }
  }
  return words;
}

std::string encode(const Address& a) {
  std::ostringstream out;
  out << a.socket_name << '\n' << a.node_id << '\n';
  for (uint64_t word : a.cores) out << word << ' ';
  return out.str();
}

Address decode(const std::string& text) {
  std::istringstream in(text);
  Address a;
  std::getline(in, a.socket_name);
  std::getline(in, a.node_id);
  for (uint64_t word; in >> word;) a.cores.push_back(word);
  return a;
}

struct PeerIdentity {
  int pid, pidfd;
};

PeerIdentity identify(int socket, const std::string& whom) {
  ucred credentials{};
  socklen_t length = sizeof credentials;
  if (getsockopt(socket, SOL_SOCKET, SO_PEERCRED, &credentials, &length) != 0) {
    throw PeerError("SO_PEERCRED failed: " + errno_text());
  }
  if (credentials.uid != geteuid()) {
    throw PeerError(whom + " runs as user " + std::to_string(credentials.uid) + ", this rank as " +
                    std::to_string(geteuid()) + "; start all ranks as one user");
  }
  const int pidfd = credentials.pid > 0 ? static_cast<int>(syscall(SYS_pidfd_open, credentials.pid, 0)) : -1;
  return {credentials.pid, pidfd};
}

// Ranks that all reach each other, taken in rank order. `reach` is symmetric.
std::vector<std::vector<int>> partition(const std::vector<std::string>& reach) {
  std::vector<std::vector<int>> hosts;
  for (int r = 0; r < static_cast<int>(reach.size()); ++r) {
    auto fits = [&](const std::vector<int>& host) {
      return std::all_of(host.begin(), host.end(),
                         [&](int other) { return reach[static_cast<size_t>(other)][static_cast<size_t>(r)] == '1'; });
    };
    auto host = std::find_if(hosts.begin(), hosts.end(), fits);
    if (host == hosts.end()) {
      hosts.push_back({r});
    } else {
      host->push_back(r);
    }
  }
  return hosts;
}

}  // namespace

std::unique_ptr<Mesh> Mesh::connect(const std::string& name, int rank, int world, KeyValue store,
                                    const std::function<size_t(int)>& segment_bytes, uint64_t timeout_ms) {
  const uint64_t until = now_ns() + timeout_ms * 1'000'000;
  auto whom = [&](int r) {
    return "rank " + std::to_string(r) + " of group '" + name + "'";
  };
  const std::string prefix = "pypar/mesh/";

  const std::string socket_name = "pypar." + random_hex();
  const int listener = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
  socklen_t length = 0;
  const sockaddr_un own_address = abstract_address(socket_name, length);
  if (listener < 0 || bind(listener, reinterpret_cast<const sockaddr*>(&own_address), length) != 0 ||
      listen(listener, world) != 0) {
    throw PeerError("can't open the socket on which ranks of this host meet: " + errno_text());
  }
  struct Closer {
    int fd;
    ~Closer() { close(fd); }
  } close_listener{listener};

  const char* node_id = std::getenv("PYPAR_NODE_ID");
  const Address own{socket_name, node_id == nullptr ? "" : node_id, own_cores()};
  store.set(prefix + "address/" + std::to_string(rank), encode(own));
  std::vector<Address> addresses(static_cast<size_t>(world));
  for (int r = 0; r < world; ++r) {
    addresses[static_cast<size_t>(r)] = r == rank ? own : decode(store.get(prefix + "address/" + std::to_string(r)));
  }

  // Lower ranks connect to higher ones and hand over a page with a token; who can read it shares memory.
  struct Sockets : std::vector<int> {
    using std::vector<int>::vector;
    ~Sockets() {
      for (int s : *this) {
        if (s >= 0) close(s);
      }
    }
  } sockets(static_cast<size_t>(world), -1);  // a peer that waits for this rank sees that it gave up
  std::vector<Segment> probes(static_cast<size_t>(world));
  std::string row(static_cast<size_t>(world), '0');
  row[static_cast<size_t>(rank)] = '1';
  for (int r = rank + 1; r < world; ++r) {
    const Address& peer = addresses[static_cast<size_t>(r)];
    if (!peer.node_id.empty() && !own.node_id.empty() && peer.node_id != own.node_id) continue;
    const int s = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
    const sockaddr_un address = abstract_address(peer.socket_name, length);
    if (s < 0 || ::connect(s, reinterpret_cast<const sockaddr*>(&address), length) != 0) {
      const std::string why = errno_text();
      if (s >= 0) close(s);
      if (!own.node_id.empty() && own.node_id == peer.node_id) {
        throw PeerError("PYPAR_NODE_ID is '" + own.node_id + "' here and on " + whom(r) +
                        ", but they can't share memory (" + why + "); give every host an id of its own");
      }
      continue;  // another host, or another network namespace
    }
    Segment probe = Segment::create(kProbeBytes);
    uint64_t token = now_ns() * 0x9e3779b97f4a7c15ull;
    std::memcpy(probe.data(), &token, sizeof token);
    Packet hello;
    hello.rank = static_cast<uint64_t>(rank);
    hello.value = token;
    send_packet(s, hello, probe.fd());
    probes[static_cast<size_t>(r)] = std::move(probe);
    sockets[static_cast<size_t>(r)] = s;
    row[static_cast<size_t>(r)] = '1';
  }
  store.set(prefix + "row/" + std::to_string(rank), row);
  std::vector<std::string> reach(static_cast<size_t>(world));
  for (int r = 0; r < world; ++r) {
    reach[static_cast<size_t>(r)] = r == rank ? row : store.get(prefix + "row/" + std::to_string(r));
  }
  for (int i = 0; i < world; ++i) {
    for (int j = 0; j < i; ++j) {
      reach[static_cast<size_t>(i)][static_cast<size_t>(j)] = reach[static_cast<size_t>(j)][static_cast<size_t>(i)];
    }
  }
  const auto callers = static_cast<int>(
      std::count(reach[static_cast<size_t>(rank)].begin(), reach[static_cast<size_t>(rank)].begin() + rank, '1'));
  for (int i = 0; i < callers; ++i) {
    wait_readable(listener, until, "a lower rank of group '" + name + "'");
    const int s = accept4(listener, nullptr, nullptr, SOCK_CLOEXEC);
    if (s < 0) throw PeerError("accept failed: " + errno_text());
    const auto [hello, fd] = receive_packet(s, until, "a lower rank of group '" + name + "'");
    const int caller = static_cast<int>(hello.rank);
    if (caller < 0 || caller >= rank || fd < 0)
      throw PeerError("a stranger called on the socket of group '" + name + "'");
    Segment probe = Segment::map(fd, kProbeBytes);
    if (std::memcmp(probe.data(), &hello.value, sizeof hello.value) != 0) {
      throw PeerError(whom(caller) + " handed over memory that doesn't hold its token");
    }
    Packet reply;
    reply.rank = static_cast<uint64_t>(rank);
    reply.value = ~hello.value;
    std::memcpy(probe.data(), &reply.value, sizeof reply.value);
    send_packet(s, reply, -1);
    sockets[static_cast<size_t>(caller)] = s;
  }
  for (int r = rank + 1; r < world; ++r) {
    if (sockets[static_cast<size_t>(r)] < 0) continue;
    const auto [reply, fd] = receive_packet(sockets[static_cast<size_t>(r)], until, whom(r));
    if (std::memcmp(probes[static_cast<size_t>(r)].data(), &reply.value, sizeof reply.value) != 0) {
      throw PeerError("memory shared with " + whom(r) + " doesn't show what it wrote");
    }
  }

  auto mesh = std::make_unique<Mesh>();
  mesh->name = name;
  mesh->hosts = partition(reach);
  for (const auto& host : mesh->hosts) {
    if (std::find(host.begin(), host.end(), rank) != host.end()) mesh->group_ranks = host;
  }
  mesh->world = static_cast<int>(mesh->group_ranks.size());
  std::vector<uint64_t> cores(own.cores.size(), 0);
  for (int i = 0; i < mesh->world; ++i) {
    const int r = mesh->group_ranks[static_cast<size_t>(i)];
    const auto& theirs = addresses[static_cast<size_t>(r)].cores;
    for (size_t w = 0; w < std::min(cores.size(), theirs.size()); ++w) cores[w] |= theirs[w];
    if (r == rank) mesh->rank = i;
    const PeerIdentity peer =
        r == rank ? PeerIdentity{getpid(), -1} : identify(sockets[static_cast<size_t>(r)], whom(r));
    mesh->pids.push_back(peer.pid);
    mesh->pidfds.push_back(peer.pidfd);
    mesh->sockets.push_back(std::exchange(sockets[static_cast<size_t>(r)], -1));
  }
  for (const auto& host : mesh->hosts) {
    if (host[0] != mesh->group_ranks[0]) mesh->group_ranks.insert(mesh->group_ranks.end(), host.begin(), host.end());
  }
  mesh->num_cores = 0;
  for (uint64_t word : cores) mesh->num_cores += __builtin_popcountll(word);

  auto segment = std::make_shared<Segment>(Segment::create(segment_bytes(mesh->world)));
  const auto theirs = mesh->exchange_fds(segment->fd(), segment->bytes(), timeout_ms);
  for (int i = 0; i < mesh->world; ++i) {
    const auto& [fd, bytes] = theirs[static_cast<size_t>(i)];
    if (i != mesh->rank && bytes != segment->bytes()) {
      throw PeerError(whom(mesh->group_ranks[static_cast<size_t>(i)]) +
                      " lays its shared memory out in another way; do all ranks run the same version of pypar?");
    }
    mesh->segments.push_back(i == mesh->rank ? segment : std::make_shared<Segment>(Segment::map(fd, bytes)));
    mesh->bases.push_back(mesh->segments.back()->data());
  }
  return mesh;
}

std::vector<std::unique_ptr<Mesh>> Mesh::in_process(int world, size_t segment_bytes) {
  std::vector<std::unique_ptr<Mesh>> meshes;
  std::vector<std::shared_ptr<Segment>> segments;
  std::vector<int> ranks;
  for (int r = 0; r < world; ++r) {
    segments.push_back(std::make_shared<Segment>(Segment::create(segment_bytes)));
    ranks.push_back(r);
  }
  for (int r = 0; r < world; ++r) {
    auto mesh = std::make_unique<Mesh>();
    mesh->name = "in_process";
    mesh->rank = r;
    mesh->world = world;
    mesh->group_ranks = ranks;
    mesh->hosts = {ranks};
    mesh->segments = segments;
    for (const auto& s : segments) mesh->bases.push_back(s->data());
    mesh->sockets.assign(static_cast<size_t>(world), -1);
    mesh->pidfds.assign(static_cast<size_t>(world), -1);
    mesh->pids.assign(static_cast<size_t>(world), getpid());
    mesh->num_cores = static_cast<int>(sysconf(_SC_NPROCESSORS_ONLN));
    meshes.push_back(std::move(mesh));
  }
  for (int i = 0; i < world; ++i) {
    for (int j = i + 1; j < world; ++j) {
      int pair[2];
      if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair) != 0) {
        throw PeerError("socketpair failed: " + errno_text());
      }
      meshes[static_cast<size_t>(i)]->sockets[static_cast<size_t>(j)] = pair[0];
      meshes[static_cast<size_t>(j)]->sockets[static_cast<size_t>(i)] = pair[1];
    }
  }
  return meshes;
}

Mesh::~Mesh() {
  for (int s : sockets) {
    if (s >= 0) close(s);
  }
  for (int p : pidfds) {
    if (p >= 0) close(p);
  }
}

std::vector<std::pair<int, uint64_t>> Mesh::exchange_fds(int fd, uint64_t value, uint64_t timeout_ms) {
  const uint64_t until = now_ns() + timeout_ms * 1'000'000;
  Packet packet;
  packet.rank = static_cast<uint64_t>(rank);
  packet.value = value;
  for (int r = 0; r < world; ++r) {
    if (r != rank) send_packet(sockets[static_cast<size_t>(r)], packet, fd);
  }
  std::vector<std::pair<int, uint64_t>> theirs;
  for (int r = 0; r < world; ++r) {
    if (r == rank) {
      theirs.emplace_back(-1, value);
      continue;
    }
    const auto [got, their_fd] = receive_packet(sockets[static_cast<size_t>(r)], until,
                                                "rank " + std::to_string(r) + " of group '" + name + "'");
    theirs.emplace_back(their_fd, got.value);
  }
  return theirs;
}

bool Mesh::alive(int peer) const {
  const auto p = static_cast<size_t>(peer);
  if (peer == rank || pids[p] == getpid()) return true;
  if (pidfds[p] >= 0) {
    pollfd process{pidfds[p], POLLIN, 0};
    return !(poll(&process, 1, 0) > 0 && (process.revents & POLLIN) != 0);
  }
  pollfd connection{sockets[p], 0, 0};
  return !(poll(&connection, 1, 0) > 0 && (connection.revents & (POLLHUP | POLLERR)) != 0);
}

}  // namespace pypar
