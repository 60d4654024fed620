// Messages between ranks that are threads of one process, for the sanitizers. rings_test WORLD ROUNDS SEED

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <thread>
#include <vector>

#include "comm/rings.h"
#include "pypar/signal.h"

using namespace pypar;

namespace {

#define EXPECT(condition)                                          \
  do {                                                             \
    if (!(condition)) {                                            \
      std::printf("line %d: %s is false\n", __LINE__, #condition); \
      std::abort();                                                \
    }                                                              \
  } while (0)

using Bytes = std::vector<unsigned char>;
using Op = std::shared_ptr<RingOp>;

struct Rank {
  std::unique_ptr<Communicator> communicator;
  std::unique_ptr<Rings> rings;
  int me = 0, world = 0;

  Op post(bool is_send, int peer, int64_t tag, Bytes& bytes) {
    return post(is_send, peer, tag, reinterpret_cast<std::byte*>(bytes.data()), bytes.size());
  }
  Op post(bool is_send, int peer, int64_t tag, std::byte* data, size_t size) {
    auto op = std::make_shared<RingOp>();
    op->is_send = is_send;
    op->peer = peer;
    op->tag = tag;
    op->data = data;
    op->bytes = size;
    op->dtype = DType::u8;
    op->deadline = Deadline::after(std::chrono::seconds(100));
    rings->post(op);
    return op;
  }
  void send(int dst, int64_t tag, Bytes& bytes) {
    if (!rings->try_send(dst, tag, bytes.data(), bytes.size(), DType::u8)) rings->wait(post(true, dst, tag, bytes));
  }
  int recv(int src, int64_t tag, Bytes& bytes) {
    int source = kAnySource;
    if (rings->try_recv(src, tag, bytes.data(), bytes.size(), DType::u8, &source)) return source;
    auto op = post(false, src, tag, bytes);
    rings->wait(op);
    return op->source;
  }
};

// From nothing to more than the ring.
constexpr size_t kSizes[] = {0, 1, 32, 33, 4096, 65536, 65537, 700000, 3000000};

unsigned char value(int src, int dst, int round) {
  return static_cast<unsigned char>(src * 31 + dst * 7 + round);
}

// Everybody to everybody, all posted at once, waited for in any order.
void all_pairs(Rank& rank, int rounds, unsigned seed) {
  std::mt19937 random(seed + static_cast<unsigned>(rank.me));
  for (int round = 0; round < rounds; ++round) {
    const size_t size = kSizes[static_cast<size_t>(round) % std::size(kSizes)];
    std::vector<Bytes> out, in;
    std::vector<Op> ops;
    for (int p = 0; p < rank.world; ++p) {
      out.emplace_back(size, value(rank.me, p, round));
      in.emplace_back(size, 0);
    }
    for (int p = 0; p < rank.world; ++p) {
      if (p == rank.me) continue;
      ops.push_back(rank.post(true, p, round, out[static_cast<size_t>(p)]));
      ops.push_back(rank.post(false, p, round, in[static_cast<size_t>(p)]));
    }
    std::shuffle(ops.begin(), ops.end(), random);
    for (const auto& op : ops) rank.rings->wait(op);
    for (int p = 0; p < rank.world; ++p) {
      if (p == rank.me) continue;
      for (unsigned char byte : in[static_cast<size_t>(p)]) EXPECT(byte == value(p, rank.me, round));
    }
  }
}

// Small messages back and forth, through the fast path; with two threads at once, on tags of their own.
void ping_pong(Rank& rank, int rounds) {
  if (rank.me > 1) return;
  std::vector<std::thread> threads;
  for (int64_t tag = 100; tag < 102; ++tag) {
    threads.emplace_back([&rank, tag, rounds] {
      Bytes bytes(8);
      for (int i = 0; i < rounds * 10; ++i) {
        std::memcpy(bytes.data(), &i, sizeof i);
        if (rank.me == 0) rank.send(1, tag, bytes);
        Bytes got(8);
        EXPECT(rank.recv(1 - rank.me, tag, got) == 1 - rank.me);
        EXPECT(got[0] == bytes[0] && got[1] == bytes[1]);
        if (rank.me == 1) rank.send(0, tag, got);
      }
    });
  }
  for (auto& thread : threads) thread.join();
}

void out_of_order(Rank& rank) {
  const int next = (rank.me + 1) % rank.world, previous = (rank.me + rank.world - 1) % rank.world;
  Bytes big(3'000'000, value(rank.me, next, 1)), small(5, value(rank.me, next, 2)), big_in(big.size()), small_in(5);
  auto first = rank.post(true, next, 1001, big), second = rank.post(true, next, 1002, small);
  EXPECT(rank.recv(previous, 1002, small_in) == previous);
  EXPECT(rank.recv(previous, 1001, big_in) == previous);
  EXPECT(small_in[4] == value(previous, rank.me, 2) && big_in.back() == value(previous, rank.me, 1));
  rank.rings->wait(first);
  rank.rings->wait(second);
}

void from_any(Rank& rank, int rounds) {
  if (rank.me != 0) {
    for (int i = 0; i < rounds; ++i) {
      Bytes bytes(40, static_cast<unsigned char>(i));
      rank.send(0, 2000, bytes);
    }
    return;
  }
  std::vector<int> seen(static_cast<size_t>(rank.world), 0);
  for (int i = 0; i < rounds * (rank.world - 1); ++i) {
    Bytes bytes(40);
    const int source = rank.recv(kAnySource, 2000, bytes);
    EXPECT(bytes[39] == static_cast<unsigned char>(seen[static_cast<size_t>(source)]++));
  }
}

// Out of symmetric memory that is rewritten the moment its send is over; then freed on one rank while it is sent.
void from_windows(Rank& rank, int rounds) {
  const int next = (rank.me + 1) % rank.world, previous = (rank.me + rank.world - 1) % rank.world;
  const auto deadline = Deadline::after(std::chrono::seconds(100));
  Segment memory = Segment::create(200'000);
  rank.communicator->rendezvous(memory.fd(), memory.data(), memory.bytes(), deadline);
  Bytes in(memory.bytes());
  for (int round = 0; round < rounds; ++round) {
    std::memset(memory.data(), value(rank.me, next, round), memory.bytes());
    auto sent = rank.post(true, next, 2500, memory.data(), memory.bytes());
    EXPECT(rank.recv(previous, 2500, in) == previous);
    rank.rings->wait(sent);
    std::memset(memory.data(), 0, memory.bytes());
    for (unsigned char byte : in) EXPECT(byte == value(previous, rank.me, round));
  }
  rank.communicator->barrier(deadline);
  if (rank.me == 0) {
    std::memset(memory.data(), 77, memory.bytes());
    rank.rings->wait(rank.post(true, 1, 2501, memory.data(), memory.bytes()));
  } else if (rank.me == 1) {
    rank.communicator->windows().forget(memory.data());
    EXPECT(rank.recv(0, 2501, in) == 0);
    EXPECT(in[199'999] == 77);
  }
  rank.communicator->barrier(deadline);
  rank.communicator->windows().forget(memory.data());
}

void without_waiting(Rank& rank) {
  const int next = (rank.me + 1) % rank.world, previous = (rank.me + rank.world - 1) % rank.world;
  Bytes out(3'000'000, value(rank.me, next, 3)), in(out.size());
  auto sent = rank.post(true, next, 3000, out), received = rank.post(false, previous, 3000, in);
  const uint64_t until = now_ns() + 60'000'000'000;
  while (!sent->finished() || !received->finished()) {
    EXPECT(now_ns() < until);
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
  EXPECT(in[123456] == value(previous, rank.me, 3));
}

// A receive that is withdrawn, one that disagrees with its send, and what is pending when the group ends.
void endings(Rank& rank) {
  Bytes bytes(8), longer(16);
  auto withdrawn = rank.post(false, (rank.me + 1) % rank.world, 4000, bytes);
  EXPECT(rank.rings->cancel(withdrawn, "no more"));
  EXPECT(withdrawn->state == RingOp::failed);
  rank.communicator->barrier({});
  bool raised = false;
  try {
    auto never = rank.post(false, (rank.me + 1) % rank.world, 4001, bytes);  // raises, too, if the others were quicker
    if (rank.me == 0) rank.send(1, 4002, bytes);
    if (rank.me == 1) rank.recv(0, 4002, longer);
    rank.rings->wait(never);
  } catch (const PeerError& error) {
    raised = std::string(error.what()).find("uint8[8] (8 bytes") != std::string::npos;
  }
  EXPECT(raised);
}

}  // namespace

int main(int argc, char** argv) {
  const int world = argc > 1 ? std::atoi(argv[1]) : 2;
  const int rounds = argc > 2 ? std::atoi(argv[2]) : 18;
  const auto seed = static_cast<unsigned>(argc > 3 ? std::atoi(argv[3]) : 1);
  auto meshes = Mesh::in_process(world, Communicator::segment_bytes(world));
  std::vector<Rank> ranks(static_cast<size_t>(world));
  std::vector<std::thread> threads;
  for (int me = 0; me < world; ++me) {
    Rank& rank = ranks[static_cast<size_t>(me)];
    rank.communicator = std::make_unique<Communicator>(std::move(meshes[static_cast<size_t>(me)]));
    rank.rings = std::make_unique<Rings>(*rank.communicator);
    rank.me = me;
    rank.world = world;
  }
  for (auto& rank : ranks) {
    threads.emplace_back([&rank, rounds, seed] {
      all_pairs(rank, rounds, seed);
      ping_pong(rank, rounds);
      out_of_order(rank);
      from_any(rank, rounds);
      from_windows(rank, rounds);
      without_waiting(rank);
      endings(rank);
    });
  }
  for (auto& thread : threads) thread.join();
  std::printf("ok\n");
}
