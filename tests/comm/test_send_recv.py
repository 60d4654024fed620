"""Point-to-point messages of the process group "pypar"."""

from __future__ import annotations

import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

import pypar.errors
from pypar import backend
from pypar.testing import run_ranks

pytestmark = pytest.mark.skipif(not backend.available(), reason="needs the compiled extension")

# In bytes: nothing, inline in the header, one slot, a slot and a bit, more than the whole ring (2 MiB).
SIZES = [0, 1, 32, 33, 4096, 131_072, 131_073, 2_100_000, 9_000_001]


def payload(src: int, dst: int, size: int, salt: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(((src * 31 + dst) * 31 + size) * 31 + salt)
    return torch.randint(0, 256, (size,), dtype=torch.uint8, generator=generator)


def check_blocking(rank: int, world: int) -> None:
    for size in SIZES:
        for src in range(world):
            for dst in range(world):
                if src == dst:
                    continue
                if rank == src:
                    dist.send(payload(src, dst, size), dst)
                elif rank == dst:
                    out = torch.empty(size, dtype=torch.uint8)
                    assert dist.recv(out, src) == src
                    assert torch.equal(out, payload(src, dst, size)), (src, dst, size)


def check_batches(rank: int, world: int) -> None:
    """Everybody sends to everybody at once, sends first: no size may deadlock."""
    peers = [p for p in range(world) if p != rank]
    for size in SIZES:
        outs = {p: torch.empty(size, dtype=torch.uint8) for p in peers}
        ops = [dist.P2POp(dist.isend, payload(rank, p, size), p) for p in peers]
        ops += [dist.P2POp(dist.irecv, outs[p], p) for p in peers]
        for work in dist.batch_isend_irecv(ops):
            work.wait()
        for p in peers:
            assert torch.equal(outs[p], payload(p, rank, size)), (p, size)
    works = []
    received = [torch.empty(100_000) for _ in range(60)]
    for i in range(60):  # 24 MB to one peer, nothing received yet
        works.append(dist.isend(torch.full((100_000,), float(rank * 100 + i)), (rank + 1) % world))
    for tensor in received:
        works.append(dist.irecv(tensor, (rank - 1) % world))
    for work in works:
        work.wait()
    for i, tensor in enumerate(received):
        assert (tensor == (rank - 1) % world * 100 + i).all()


def check_tags(rank: int, world: int) -> None:
    """A big message that nobody wants yet does not block a small one behind it."""
    nxt, prev = (rank + 1) % world, (rank - 1) % world
    big = payload(rank, nxt, 5_000_000)
    sends = [dist.isend(big, nxt, tag=1)]
    sends += [dist.isend(torch.tensor([rank * 10 + tag]), nxt, tag=tag) for tag in (2, 3, 4)]
    for tag in (4, 2, 3):
        out = torch.empty(1, dtype=torch.int64)
        dist.recv(out, prev, tag=tag)
        assert out.item() == prev * 10 + tag
    out = torch.empty_like(big)
    dist.recv(out, prev, tag=1)
    assert torch.equal(out, payload(prev, rank, 5_000_000))
    for work in sends:
        work.wait()


def check_any_source(rank: int, world: int) -> None:
    # Tags of their own: a rank may be at the second size, or at the next check, while another is at the first.
    for tag, size in ((20, 4), (21, 400_000)):
        if rank == 0:
            counts = [0] * world
            for _ in range(20 * (world - 1)):
                out = torch.empty(size // 4, dtype=torch.int32)
                source = dist.recv(out, tag=tag)
                assert out[0].item() == source * 1000 + counts[source], "messages of one rank overtook each other"
                counts[source] += 1
            assert counts[1:] == [20] * (world - 1)
            works = [dist.irecv(torch.empty(1), None, tag=7 + tag) for _ in range(world - 1)]
            for work in works:
                work.wait()
            assert sorted(work._source_rank() for work in works) == list(range(1, world))
        else:
            for i in range(20):
                dist.send(torch.full((size // 4,), rank * 1000 + i, dtype=torch.int32), 0, tag=tag)
            dist.send(torch.ones(1), 0, tag=7 + tag)


def check_tensors(rank: int, world: int) -> None:
    if rank == 0:
        dist.send(torch.arange(24.0).view(4, 6).t(), 1)
        dist.send(torch.arange(6.0).view(2, 3), 1)
        dist.send(torch.complex(torch.ones(3), torch.arange(3.0)), 1)
        dist.send(torch.tensor(3.5, dtype=torch.bfloat16), 1)
        dist.send_object_list(["a", {"b": 1}], dst=1)
    elif rank == 1:
        out = torch.empty(6, 4)
        dist.recv(out, 0)
        assert torch.equal(out, torch.arange(24.0).view(4, 6).t())
        out = torch.zeros(3, 2).t()  # not contiguous: filled through a copy
        dist.recv(out, 0)
        assert torch.equal(out, torch.arange(6.0).view(2, 3))
        out = torch.empty(3, dtype=torch.complex64)
        dist.recv(out, 0)
        assert torch.equal(out, torch.complex(torch.ones(3), torch.arange(3.0)))
        out = torch.empty((), dtype=torch.bfloat16)
        dist.recv(out, 0)
        assert out.item() == 3.5
        box = [None, None]
        dist.recv_object_list(box, src=0)
        assert box == ["a", {"b": 1}]


def check_progress_without_waiting(rank: int, world: int) -> None:
    """Nobody waits for the messages while the ranks are busy elsewhere: they arrive all the same."""
    nxt, prev = (rank + 1) % world, (rank - 1) % world
    out = torch.empty(6_000_000, dtype=torch.uint8)
    works = [dist.isend(payload(rank, nxt, 6_000_000), nxt), dist.irecv(out, prev)]
    deadline = time.monotonic() + 20
    while not all(work.is_completed() for work in works):
        assert time.monotonic() < deadline, "no progress in the background"
        time.sleep(0.001)
    assert torch.equal(out, payload(prev, rank, 6_000_000))
    # A send that can't complete must not keep its sender out of a collective, nor the other way round.
    work = dist.isend(payload(rank, nxt, 6_000_000), nxt)
    dist.barrier()
    dist.recv(out, prev)
    work.wait()


def check_futures(rank: int, world: int) -> None:
    if rank == 0:
        dist.isend(torch.arange(5.0), 1).wait()
    elif rank == 1:
        work = dist.irecv(torch.empty(5), 0)
        assert work.get_future().then(lambda f: f.value()[0].sum()).wait().item() == 10.0


def check_random_traffic(rank: int, world: int) -> None:
    """Seeded traffic of many sizes and tags, all in flight together, with stalls."""
    import random

    plan = random.Random(5)
    sizes = [0, 8, 40, 5000, 131_072, 700_000]
    messages = [
        (src, dst, plan.choice(sizes), plan.randrange(3), i)
        for i in range(300)
        for src, dst in [plan.sample(range(world), 2)]
    ]
    own = random.Random(rank)
    works, expected = [], []
    order = [m for m in messages if rank in (m[0], m[1])]
    for src, dst, size, tag, salt in order:
        if rank == src:
            works.append(dist.isend(payload(src, dst, size, salt), dst, tag=tag))
        else:
            out = torch.empty(size, dtype=torch.uint8)
            works.append(dist.irecv(out, src, tag=tag))
            expected.append((out, payload(src, dst, size, salt)))
        if own.random() < 0.05:
            time.sleep(0.003)
    own.shuffle(works)
    for work in works:
        work.wait()
    for out, want in expected:
        assert torch.equal(out, want)


def all_checks(rank: int, world: int) -> None:
    check_blocking(rank, world)
    check_batches(rank, world)
    check_tags(rank, world)
    check_any_source(rank, world)
    check_tensors(rank, world)
    check_futures(rank, world)
    check_progress_without_waiting(rank, world)
    check_random_traffic(rank, world)
    dist.barrier()


@pytest.mark.parametrize("world", [2, 3, 4])
def test_messages(world):
    run_ranks(all_checks, world)


def sizes_disagree(rank: int, world: int) -> None:
    if rank == 0:
        dist.send(torch.ones(8), 1)
        with pytest.raises(pypar.errors.PeerError, match=r"float32\[8\] \(32 bytes.*float32\[16\] \(64 bytes"):
            dist.recv(torch.empty(1), 1)
    else:
        with pytest.raises(pypar.errors.PeerError, match=r"float32\[8\] \(32 bytes.*float32\[16\] \(64 bytes"):
            dist.recv(torch.empty(16), 0)


def types_disagree(rank: int, world: int) -> None:
    with pytest.raises(pypar.errors.PeerError, match=r"int64\[4\].*float64\[4\]"):
        if rank == 0:
            dist.send(torch.ones(4, dtype=torch.int64), 1)
            dist.recv(torch.empty(1), 1)
        else:
            dist.recv(torch.empty(4, dtype=torch.float64), 0)


@pytest.mark.parametrize("body", [sizes_disagree, types_disagree])
def test_disagreement(body):
    run_ranks(body, 2)


def never_sent(rank: int, world: int) -> None:
    group = dist.new_group(timeout=timedelta(seconds=1))
    if rank == 0:
        started = time.monotonic()
        with pytest.raises(pypar.errors.PeerError, match=r"recv\(float32\[3\], tag 0\) from rank 1: waited 1000 ms"):
            dist.recv(torch.empty(3), 1, group=group)
        assert time.monotonic() - started < 5
    dist.barrier()


def test_a_message_that_never_comes():
    run_ranks(never_sent, 2)
