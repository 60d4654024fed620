"""Messages that lie in symmetric memory: the receiver copies them out of the sender's tensor, once."""

from __future__ import annotations

import gc
import os
import random
import signal
import time

import pytest
import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as symm

import pypar
from pypar import backend
from pypar.testing import run_ranks

pytestmark = pytest.mark.skipif(not backend.available(), reason="needs the compiled extension")

NUMEL = 1_500_000


def window(numel: int = NUMEL) -> torch.Tensor:
    tensor = symm.empty(numel, dtype=torch.float32, device="cpu")
    symm.rendezvous(tensor, dist.group.WORLD.group_name)
    return tensor.zero_()


def payload(rank: int, numel: int, salt: int) -> torch.Tensor:
    return torch.arange(numel, dtype=torch.float32) % 977 + 1000 * rank + salt


def check_sizes(rank: int, world: int) -> None:
    """Below and above the size from which a message is announced; at any offset; into either kind of memory."""
    source, target = window(), window()
    nxt, prev = (rank + 1) % world, (rank - 1) % world
    for salt, numel in enumerate((1, 16_383, 16_384, 16_385, 400_001, NUMEL - 7)):
        for into in (target[5 : numel + 5], torch.empty(numel)):
            source[7 : 7 + numel] = payload(rank, numel, salt)
            work = dist.isend(source[7 : 7 + numel], nxt)
            dist.recv(into, prev)
            work.wait()
            source[7 : 7 + numel] = -1  # the send is over: what was received does not change
            assert torch.equal(into, payload(prev, numel, salt)), numel


def check_reuse(rank: int, world: int) -> None:
    """The same buffer again and again, rewritten the moment its send is over, with stalls on both sides."""
    source, out = window(100_000), torch.empty(100_000)
    stalls = random.Random(rank)
    for i in range(200):
        if stalls.random() < 0.1:
            time.sleep(stalls.random() * 0.004)
        if rank == 0:
            source.fill_(float(i))
            dist.send(source, 1)
        elif rank == 1:
            dist.recv(out, 0)
            assert (out == i).all(), i


def check_order_and_tags(rank: int, world: int) -> None:
    """Announced and ordinary messages keep their order; one that nobody wants yet blocks no other tag."""
    if rank == 0:
        source = window(3 * 50_000)
        parts = source.view(3, 50_000)
        works = []
        for i, part in enumerate(parts):
            part.fill_(float(i))
            works.append(dist.isend(part, 1, tag=1))
            works.append(dist.isend(torch.full((50_000,), 10.0 + i), 1, tag=1))
        works.append(dist.isend(torch.tensor([7]), 1, tag=2))
        for work in works:
            work.wait()
    else:
        window(3 * 50_000)
        if rank == 1:
            small = torch.empty(1, dtype=torch.int64)
            dist.recv(small, 0, tag=2)
            assert small.item() == 7
            for want in (0.0, 10.0, 1.0, 11.0, 2.0, 12.0):
                out = torch.empty(50_000)
                dist.recv(out, 0, tag=1)
                assert (out == want).all(), (want, out[0])


def check_any_source(rank: int, world: int) -> None:
    source = window(100_000)
    if rank == 0:
        out, seen = torch.empty(100_000), []
        for _ in range(world - 1):
            src = dist.recv(out)
            assert (out == src).all()
            seen.append(src)
        assert sorted(seen) == list(range(1, world))
    else:
        source.fill_(float(rank))
        dist.send(source, 0)


def check_freed_at_the_receiver(rank: int, world: int) -> None:
    """A rank that has freed its own part still receives, also what was announced before it was freed."""
    tensor = window(200_000)
    if rank == 0:
        tensor.fill_(3.0)
        first = dist.isend(tensor, 1)  # announced at once
        dist.barrier()
        dist.barrier()  # rank 1 has freed its part
        tensor_again = tensor[:100_000]
        second = dist.isend(tensor_again, 1, tag=1)
        first.wait()
        second.wait()
    else:
        dist.barrier()
        del tensor
        gc.collect()
        dist.barrier()
        if rank == 1:
            out = torch.empty(200_000)
            dist.recv(out, 0)
            assert (out == 3.0).all()
            dist.recv(out[:100_000], 0, tag=1)
            assert (out == 3.0).all()


def all_checks(rank: int, world: int) -> None:
    check_sizes(rank, world)
    check_reuse(rank, world)
    check_order_and_tags(rank, world)
    check_any_source(rank, world)
    check_freed_at_the_receiver(rank, world)
    dist.barrier()


@pytest.mark.parametrize("world", [2, 3, 4])
def test_messages_in_symmetric_memory(world):
    run_ranks(all_checks, world)


def sizes_disagree(rank: int, world: int) -> None:
    source = window(100_000)
    with pytest.raises(
        pypar.PeerError, match=r"rank 0 sent float32\[100000\].*rank 1, which receives float32\[99999\]"
    ):
        if rank == 0:
            dist.send(source, 1)
        else:
            dist.recv(torch.empty(99_999), 0)


def test_a_receiver_that_expects_another_size_is_an_error_on_both():
    run_ranks(sizes_disagree, 2)


def receiver_dies(rank: int, world: int) -> None:
    source = window(100_000)
    if rank == 1:
        time.sleep(0.3)
        os.kill(os.getpid(), signal.SIGKILL)
    with pytest.raises(pypar.PeerError, match=r"rank 1 .* is dead"):
        dist.send(source, 1)


def test_a_receiver_that_dies_ends_the_sender():
    *_, failures = run_ranks(receiver_dies, 2, expect_failure=True)
    assert failures == {1: "died with exit code -9"}
