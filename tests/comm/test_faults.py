"""A rank that dies, stalls or disagrees is an exception on every other rank: never a hang, never a wrong number."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as symm

import pypar
from pypar.testing import run_ranks


def name():
    return dist.group.WORLD.group_name


def outcome(call, rank_text):
    """(seconds, message) of the PeerError that `call` raises; loops, since the fault may come between two calls."""
    start = time.monotonic()
    with pytest.raises(pypar.PeerError) as caught:
        for _ in range(1_000_000):
            call()
    message = str(caught.value)
    assert rank_text in message, message
    with pytest.raises(pypar.PeerError):  # sticky: the group is of no use any more, and says so at once
        call()
    return time.monotonic() - start, message


def killed_in_all_reduce(rank, world, kind):
    x = torch.ones(3_000_000)
    t = symm.empty(3_000_000, dtype=torch.float32, device="cpu")
    symm.rendezvous(t, name())
    t.zero_()
    calls = {
        "ordinary": lambda: torch.ops.pypar.all_reduce_(x, "max", name()),
        "symmetric": lambda: torch.ops.pypar.all_reduce_(t, "max", name()),
        "c10d": lambda: dist.all_reduce(x, op=dist.ReduceOp.MAX),
        "async": lambda: dist.all_reduce(x, op=dist.ReduceOp.MAX, async_op=True).wait(),
        "signal": lambda: symm.rendezvous(t, name()).barrier(0, 20_000),
    }
    if rank == 1:
        threading.Timer(0.7, lambda: os.kill(os.getpid(), signal.SIGKILL)).start()
        while True:
            calls[kind]()
    seconds, message = outcome(calls[kind], "rank 1") if kind != "signal" else signal_outcome(calls[kind])
    assert "is dead" in message
    return seconds


def signal_outcome(call):
    start = time.monotonic()
    with pytest.raises(pypar.PeerError, match="rank 1") as caught:
        for _ in range(100_000_000):
            call()
    return time.monotonic() - start, str(caught.value)


@pytest.mark.parametrize("kind", ["ordinary", "symmetric", "c10d", "async", "signal"])
def test_a_killed_rank_ends_every_survivor_within_five_seconds(kind):
    *seconds, failures = run_ranks(killed_in_all_reduce, 3, kind, expect_failure=True, timeout_s=60)
    assert failures == {1: "died with exit code -9"}
    assert max(s for s in seconds if s is not None) < 0.7 + 5


def one_never_calls(rank, world):
    if rank == 1:
        time.sleep(6)
        # It comes late: its peers have given up, so must it.
        with pytest.raises(pypar.PeerError, match="waited 2000 ms"):
            dist.all_reduce(torch.ones(4))
        return None
    start = time.monotonic()
    with pytest.raises(pypar.PeerError, match=r"rank \d of group .* in all_reduce\(float32\[4\], sum\)"):
        dist.all_reduce(torch.ones(4))
    return time.monotonic() - start


def test_a_rank_that_never_calls_is_a_timeout_that_names_the_call():
    seconds = run_ranks(one_never_calls, 3, timeout_s=2)
    assert all(2 <= s < 5 for s in seconds if s is not None)


def mismatch(rank, world, kind):
    x = torch.ones(10 + (rank == 1))
    with pytest.raises(pypar.PeerError) as caught:
        if kind == "shape":
            dist.all_reduce(x)
        elif kind == "dtype":
            dist.all_reduce(torch.ones(10, dtype=torch.float64 if rank == 1 else torch.float32))
        elif kind == "reduction":
            dist.all_reduce(torch.ones(10), op=dist.ReduceOp.MAX if rank == 1 else dist.ReduceOp.SUM)
        elif kind == "operation":
            dist.broadcast(torch.ones(10), 0) if rank == 1 else dist.all_reduce(torch.ones(10))
        else:
            dist.broadcast(torch.ones(10), int(rank == 1))
    return str(caught.value)


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("shape", ["rank 0 called all_reduce(float32[10], sum)", "rank 1 called all_reduce(float32[11], sum)"]),
        ("dtype", ["rank 0 called all_reduce(float32[10], sum)", "rank 1 called all_reduce(float64[10], sum)"]),
        ("reduction", ["rank 1 called all_reduce(float32[10], max)"]),
        ("operation", ["rank 1 called broadcast(float32[10], root 0)", "rank 2 called all_reduce(float32[10], sum)"]),
        ("root", ["rank 1 called broadcast(float32[10], root 1)"]),
    ],
)
def test_ranks_that_disagree_all_raise_and_say_who_called_what(kind, said):
    for message in run_ranks(mismatch, 3, kind):
        assert all(part in message for part in said), message


def one_raises(rank, world):
    dist.all_reduce(torch.ones(4))
    if rank == 1:
        raise ValueError("a fault of the model")
    return outcome(lambda: dist.all_reduce(torch.ones(4)), "rank 1")[0]


def test_a_rank_that_raises_ends_the_others():
    *seconds, failures = run_ranks(one_raises, 3, expect_failure=True, timeout_s=60)
    assert list(failures) == [1] and "a fault of the model" in failures[1]
    assert max(s for s in seconds if s is not None) < 5


def left_early(rank, world):
    dist.all_reduce(torch.ones(4))
    if rank == 1:
        dist.destroy_process_group()
        time.sleep(2)
        return None
    return outcome(lambda: dist.all_reduce(torch.ones(4)), "rank 1")


def test_a_rank_that_leaves_early_ends_the_others():
    results = run_ranks(left_early, 2)
    assert results[0][0] < 2 and "has left the group" in results[0][1]


def own_shared_memory():
    return {p.name for p in Path("/dev/shm").iterdir()} if Path("/dev/shm").is_dir() else set()


def die_with_memory(rank, world):
    t = symm.empty(1_000_000, dtype=torch.float32, device="cpu")
    symm.rendezvous(t, name())
    dist.all_reduce(t)
    os.kill(os.getpid(), signal.SIGKILL)


def test_nothing_is_left_when_all_ranks_are_killed():
    before = own_shared_memory()
    *_, failures = run_ranks(die_with_memory, 2, expect_failure=True)
    assert set(failures.values()) == {"died with exit code -9"}
    assert own_shared_memory() == before
