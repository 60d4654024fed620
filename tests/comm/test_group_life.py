"""The process group beside its calls: threads, a second start, timeouts, errors, monitored barriers."""

from __future__ import annotations

from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

import pypar.errors
from pypar import backend
from pypar.testing import run_ranks

pytestmark = pytest.mark.skipif(not backend.available(), reason="needs the compiled extension")


def many_threads(rank: int, world: int) -> None:
    """Each thread has a group of its own, as DataParallel and a pipeline beside it have."""
    import threading

    groups = [dist.new_group() for _ in range(4)]
    errors: list[BaseException] = []

    def body(index: int) -> None:
        try:
            for i in range(100):
                tensor = torch.full((257 * (i % 5) + 1,), float(rank + index))
                dist.all_reduce(tensor, group=groups[index], async_op=bool(i % 2)) and None
                dist.barrier(group=groups[index])
                assert tensor[0].item() == sum(range(world)) + world * index
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=body, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors, errors


def test_threads_with_a_group_each():
    run_ranks(many_threads, 2)


def reinitialised(rank: int, world: int, folder: str) -> None:
    for i in range(3):
        store = dist.FileStore(f"{folder}/{i}", world)
        dist.init_process_group("pypar", store=store, rank=rank, world_size=world)
        tensor = torch.tensor([rank + i])
        dist.all_reduce(tensor)
        assert tensor.item() == sum(range(world)) + world * i
        dist.destroy_process_group()


def test_init_and_destroy_again(tmp_path):
    run_ranks(reinitialised, 2, str(tmp_path), backend="none")


def mixed_backend(rank: int, world: int, folder: str) -> None:
    store = dist.FileStore(f"{folder}/store", world)
    dist.init_process_group("cpu:pypar", store=store, rank=rank, world_size=world)
    tensor = torch.tensor([1.0])
    dist.all_reduce(tensor)
    assert tensor.item() == world
    assert dist.group.WORLD._get_backend(torch.device("cpu")).name() == "pypar"


def test_backend_named_by_device(tmp_path):
    run_ranks(mixed_backend, 2, str(tmp_path), backend="none")


def timeouts(rank: int, world: int) -> str:
    group = dist.new_group(timeout=timedelta(seconds=1))
    if rank == 0:
        with pytest.raises(pypar.errors.PeerError, match="timeout of the group") as raised:
            dist.barrier(group=group)
        assert isinstance(raised.value, dist.DistError) and isinstance(raised.value, RuntimeError)
        with pytest.raises(pypar.errors.PeerError):
            dist.all_reduce(torch.ones(1), group=group)
        work = dist.group.WORLD._get_backend(torch.device("cpu"))
        assert work is not None
    other = dist.new_group()
    tensor = torch.ones(1)
    dist.all_reduce(tensor, group=other)  # the group that failed does not spoil its siblings
    return str(tensor.item())


def test_a_rank_that_does_not_come():
    assert run_ranks(timeouts, 2) == ["2.0", "2.0"]


def async_failure(rank: int, world: int) -> None:
    group = dist.new_group(timeout=timedelta(seconds=20))
    tensor = torch.ones(4 if rank == 0 else 5)
    work = dist.all_reduce(tensor, group=group, async_op=True)
    future = work.get_future()
    with pytest.raises(pypar.errors.PeerError, match=r"rank 0 called all_reduce\(float32\[4\]"):
        work.wait()
    assert isinstance(work.exception(), BaseException) or work.exception() is not None
    with pytest.raises(Exception, match="disagree"):
        future.wait()
    with pytest.raises(pypar.errors.PeerError):
        dist.barrier(group=group)


def test_an_asynchronous_mismatch_raises_at_wait():
    run_ranks(async_failure, 2)


def through_autograd(rank: int, world: int) -> None:
    class Bad(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return (
                torch.ops._c10d_functional.all_reduce(torch.ones(3 + rank), "sum", dist.group.WORLD.group_name).sum()
                + grad
            )

    x = torch.ones(1, requires_grad=True)
    with pytest.raises(pypar.errors.PeerError, match="disagree"):
        Bad.apply(x).backward(torch.ones(1))
        dist.barrier()


def test_errors_keep_their_type_through_autograd():
    run_ranks(through_autograd, 2)


def monitored(rank: int, world: int) -> None:
    group = dist.group.WORLD
    group.monitored_barrier(timedelta(seconds=5))
    group.monitored_barrier(timedelta(seconds=5), wait_all_ranks=True)
    if rank == 0:
        with pytest.raises(RuntimeError, match="Rank 1 failed to pass monitoredBarrier in 200 ms"):
            group.monitored_barrier(timedelta(milliseconds=200))
    elif rank == 2:
        with pytest.raises(RuntimeError, match="Rank 2 successfully reached monitoredBarrier"):
            group.monitored_barrier(timedelta(milliseconds=200))
    dist.barrier()
    if rank == 0:
        with pytest.raises(RuntimeError, match="Ranks 1, 2 failed to pass monitoredBarrier"):
            group.monitored_barrier(timedelta(milliseconds=100), wait_all_ranks=True)
    dist.barrier()  # the group is not hurt


def test_monitored_barrier():
    run_ranks(monitored, 3)
