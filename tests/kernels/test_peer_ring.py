"""The ring of csrc/cuda behind the interface of pipelines, emulated: containers, large tensors, back-pressure, a stage
that stays away."""

from __future__ import annotations

import time

import pytest
import torch
import torch.distributed as dist
from kernels import cuda_executor

from pypar.ops.gpu.ring import PeerRing
from pypar.pipeline_parallel.ring import Channel
from pypar.testing import RankFailed, run_ranks

pytestmark = pytest.mark.skipif(cuda_executor.COMPILER is None, reason="no g++ on this machine")
CPU = torch.device("cpu")


def payload(n: int) -> dict:
    generator = torch.Generator().manual_seed(n)
    shapes = [(), (0,), (3, 5), (1, 2, 1, 2), (700, 9)]
    tensors = [torch.randn(shape, generator=generator) for shape in shapes[: 1 + n % 5]]
    return {"x": tensors, "half": tensors[-1].bfloat16(), "number": n, "mask": tensors[0] > 0}


def same(got: dict, want: dict) -> None:
    assert got["number"] == want["number"]
    for a, b in zip([*got["x"], got["half"], got["mask"]], [*want["x"], want["half"], want["mask"]], strict=True):
        assert torch.equal(a, b) and a.dtype == b.dtype


def exchange(rank: int, world: int, num_slots: int, slot_bytes: int) -> int:
    """Around a circle of ranks, containers whose structure and sizes change; one rank is slow."""
    cuda_executor.load()
    edges = [(r, (r + 1) % world) for r in range(world)]
    rings = [PeerRing(src, dst, num_slots, slot_bytes, dist.group.WORLD, CPU) for src, dst in edges]
    out, back = Channel(rings[rank]), Channel(rings[(rank - 1) % world])
    for n in range(30):
        out.send(payload(100 * rank + n), n)
        if rank == 1 and n % 7 == 0:
            time.sleep(0.02)
        same(back.recv(n), payload(100 * ((rank - 1) % world) + n))
    return 30


@pytest.mark.parametrize("world", [2, 3])
def test_containers_arrive_as_they_were_sent(world):
    cuda_executor.load()
    assert run_ranks(exchange, world, 48, 4096) == [30] * world


def one_way(rank: int, world: int) -> None:
    cuda_executor.load()
    channel = Channel(PeerRing(0, 1, 2, 1024, dist.group.WORLD, CPU))
    for n in range(15):  # most have more pieces than there are slots
        if rank == 0:
            channel.send(payload(n), n)
        else:
            time.sleep(0.01)
            same(channel.recv(n), payload(n))


def test_a_sender_waits_for_slots():
    cuda_executor.load()
    run_ranks(one_way, 2)


def alone(rank: int, world: int) -> None:
    cuda_executor.load()
    ring = PeerRing(0, 1, 2, 1024, dist.group.WORLD, CPU)
    if rank == 1:
        ring.recv()  # the other one sends nothing


def test_a_peer_that_sends_nothing_is_named():
    cuda_executor.load()
    with pytest.raises(RankFailed) as failed:
        run_ranks(alone, 2, timeout_s=3)
    assert "PeerError: ring from 0 to 1" in failed.value.failures[1]
    assert "waited for the data of rank 0" in failed.value.failures[1]
