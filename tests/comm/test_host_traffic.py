"""What crosses the network: every byte once per host, and nothing of what stays on a host."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from pypar import backend
from pypar.testing import run_ranks

pytestmark = [
    pytest.mark.skipif(not backend.available(), reason="needs the compiled extension"),
    pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="the kernel does not count bytes"),
]

N = 1_000_000  # bytes of a part


def written() -> int:
    """Bytes that this process wrote, to sockets too: gloo's, since shared memory takes no system calls."""
    for line in Path("/proc/self/io").read_text().splitlines():
        if line.startswith("wchar:"):
            return int(line.split()[1])
    raise AssertionError("no wchar in /proc/self/io")


def ones(n: int) -> torch.Tensor:
    return torch.ones(n, dtype=torch.uint8)


def traffic(rank: int, world: int, folder: str, nodes: str) -> dict[str, int]:
    os.environ["PYPAR_NODE_ID"] = nodes[rank]
    dist.init_process_group("pypar", store=dist.FileStore(f"{folder}/store", world), rank=rank, world_size=world)
    near = [r for r in range(world) if nodes[r] == nodes[rank]]
    peer = near[1 - near.index(rank)] if len(near) == 2 else rank
    sizes = [N + r for r in range(world)]

    def near_messages() -> None:
        if peer != rank:
            work = dist.isend(ones(N), peer)
            dist.recv(ones(N), peer)
            work.wait()

    calls: dict[str, Callable[[], object]] = {
        "near_messages": near_messages,
        "all_gather": lambda: dist.all_gather([ones(n) for n in sizes], ones(sizes[rank])),
        "gather": lambda: dist.gather(ones(N), [ones(N) for _ in sizes] if rank == 1 else None, 1),
        "scatter": lambda: dist.scatter(ones(N), [ones(N) for _ in sizes] if rank == 1 else None, 1),
        "all_to_all": lambda: dist.all_to_all_single(ones(world * N), ones(world * N)),
        "reduce_scatter": lambda: dist.reduce_scatter(ones(sizes[rank]), [ones(n) for n in sizes]),
        "broadcast": lambda: dist.broadcast(ones(N), 1),
    }
    sent = {}
    for name, call in calls.items():
        dist.barrier()
        before = written()
        call()
        dist.barrier()
        sent[name] = written() - before
    return sent


def test_a_byte_crosses_once_per_host(tmp_path):
    nodes = "aab"
    results = run_ranks(traffic, len(nodes), str(tmp_path), nodes, backend="none")
    # By host: what must leave it.
    expected = {
        "near_messages": (0, 0),
        "all_gather": (2 * N, N),
        "gather": (0, N),
        "scatter": (N, 0),
        "all_to_all": (2 * N, 2 * N),
        "reduce_scatter": (N, 2 * N),  # sums of the other host's shards
        "broadcast": (N, 0),
    }
    for name, (from_a, from_b) in expected.items():
        for host, least in (("a", from_a), ("b", from_b)):
            sent = sum(results[r][name] for r in range(len(nodes)) if nodes[r] == host)
            assert least <= sent < least * 1.01 + 50_000, f"{name}: host {host} sent {sent} bytes, expected {least}"
