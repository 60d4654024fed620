"""TORCH_DISTRIBUTED_DEBUG=DETAIL: torch wraps the backend and compares the calls of all ranks through gloo first."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as symm

import pypar
from pypar.testing import run_ranks


def in_detail(rank, world, path, body):
    dist.set_debug_level(dist.DebugLevel.DETAIL)  # torch read the variable when it was imported
    dist.init_process_group("pypar", store=dist.FileStore(path, world), rank=rank, world_size=world)
    return body(rank, world)


def calls(rank, world):
    x = torch.full((1000,), float(rank + 1))
    dist.all_reduce(x)
    assert torch.equal(x, torch.full((1000,), world * (world + 1) / 2))
    work = dist.all_reduce(torch.ones(5), async_op=True)
    work.wait()
    parts = [torch.empty(3) for _ in range(world)]
    dist.all_gather(parts, torch.full((3,), float(rank)))
    assert [int(p[0]) for p in parts] == list(range(world))
    dist.broadcast(x, 1)
    dist.barrier()
    if rank == 0:
        dist.send(torch.arange(4.0), 1)
    elif rank == 1:
        got = torch.empty(4)
        dist.recv(got, 0)
        assert torch.equal(got, torch.arange(4.0))
    group = dist.new_group([0, 1])
    if rank < 2:
        y = torch.ones(7)
        dist.all_reduce(y, group=group)
        assert torch.equal(y, torch.full((7,), 2.0))
    t = symm.empty(10, dtype=torch.float32, device="cpu")
    symm.rendezvous(t, dist.group.WORLD.group_name).barrier()
    t.fill_(1)
    torch.ops.pypar.all_reduce_(t, "sum", dist.group.WORLD.group_name)
    assert torch.equal(t, torch.full((10,), float(world)))
    model = pypar.DataParallel(torch.nn.Linear(4, 2))
    model(torch.ones(3, 4)).sum().backward()
    dist.barrier()


def test_the_backend_works(tmp_path):
    run_ranks(in_detail, 3, str(tmp_path / "store"), calls, backend="none")


def disagree(rank, world):
    with pytest.raises(RuntimeError) as caught:
        dist.all_reduce(torch.ones(10 + rank))
    return str(caught.value)


def test_a_mismatch_is_an_error_on_every_rank(tmp_path):
    messages = run_ranks(in_detail, 2, str(tmp_path / "store"), disagree, backend="none")
    assert all("ALLREDUCE" in message and "10" in message and "11" in message for message in messages), messages
