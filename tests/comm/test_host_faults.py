"""A rank that dies, raises or leaves on one host ends its group on every host: within seconds, with its name.

PYPAR_NODE_ID makes several "hosts" of this machine.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import pypar
from pypar import backend
from pypar.testing import run_ranks

pytestmark = pytest.mark.skipif(not backend.available(), reason="needs the compiled extension")

LIMIT_S = 5.0


def start(rank: int, world: int, folder: str, nodes: str, kind: str = "file") -> None:
    os.environ["PYPAR_NODE_ID"] = nodes[rank]
    port = Path(folder) / "port"
    if kind == "file":
        store = dist.FileStore(f"{folder}/store", world)
    elif rank == 0:
        store = dist.TCPStore("127.0.0.1", 0, world, True, wait_for_workers=False)
        (port.parent / "port.tmp").write_text(str(store.port))
        (port.parent / "port.tmp").rename(port)
    else:
        while not port.exists():
            time.sleep(0.01)
        store = dist.TCPStore("127.0.0.1", int(port.read_text()), world, False, wait_for_workers=False)
    dist.init_process_group("pypar", store=store, rank=rank, world_size=world)


def outcome(call) -> tuple[float, str]:
    """When the PeerError came that `call` raises, and what it says; loops, the fault may come between two calls."""
    with pytest.raises(pypar.PeerError) as caught:
        for _ in range(1_000_000):
            call()
    ended = time.time()
    with pytest.raises(pypar.PeerError):  # sticky: the group is of no use any more, and says so at once
        dist.barrier()
    assert time.time() - ended < 1
    return ended, str(caught.value)


def waits(rank: int, world: int, victim: int, kind: str):
    """What a survivor does. Messages are awaited from another survivor, which never sends any, if there is one."""
    x = torch.ones(50_000)
    peer = next((r for r in range(world) if r not in (rank, victim)), victim)
    return {
        "all_reduce": lambda: dist.all_reduce(x, op=dist.ReduceOp.MAX),
        "async": lambda: dist.all_reduce(x, op=dist.ReduceOp.MAX, async_op=True).wait(),
        "barrier": dist.barrier,
        "gather": lambda: dist.gather(x, [torch.empty_like(x) for _ in range(world)] if rank == 1 else None, 1),
        "recv": lambda: dist.recv(torch.empty(3), peer),
        "any": lambda: dist.recv(torch.empty(3)),
        "send": lambda: dist.send(torch.empty(3_000_000), victim),
    }[kind]


def one_dies(rank: int, world: int, folder: str, nodes: str, victim: int, kind: str, how: str, store: str):
    start(rank, world, folder, nodes, store)
    dist.all_reduce(torch.ones(4))
    call = waits(rank, world, victim, kind)
    if rank != victim:
        return outcome(call)

    def note() -> None:
        Path(folder, "died").write_text(str(time.time()))

    if how == "kill":
        threading.Timer(0.7, lambda: (note(), os.kill(os.getpid(), signal.SIGKILL))).start()
    until = time.time() + 0.7
    while how == "kill" or time.time() < until:
        time.sleep(0.01) if kind in ("recv", "any", "send") else call()
    note()
    raise ValueError("a fault of the model")


@pytest.mark.parametrize(
    ("nodes", "victim", "kind", "how", "store"),
    [
        ("aabb", 1, "all_reduce", "kill", "file"),
        ("aabb", 0, "async", "kill", "file"),
        ("aabb", 3, "recv", "kill", "tcp"),
        ("aab", 1, "barrier", "raise", "tcp"),
        ("aab", 2, "gather", "kill", "file"),
        ("aab", 0, "any", "raise", "file"),
        ("aab", 0, "recv", "kill", "tcp"),  # the store goes with it
        ("ab", 0, "all_reduce", "kill", "tcp"),
        ("ab", 1, "send", "kill", "file"),
        ("abc", 2, "recv", "kill", "file"),  # nobody is connected to it but through gloo, and nobody waits for it
    ],
)
def test_a_rank_that_dies_ends_the_survivors_on_all_hosts(tmp_path, nodes, victim, kind, how, store):
    world = len(nodes)
    *ends, failures = run_ranks(
        one_dies, world, str(tmp_path), nodes, victim, kind, how, store, backend="none", expect_failure=True
    )
    assert list(failures) == [victim], failures
    died_at = float((tmp_path / "died").read_text())
    for rank in set(range(world)) - {victim}:
        ended, message = ends[rank]
        assert f"rank {victim}" in message, message
        assert ended - died_at < LIMIT_S, f"rank {rank} ended after {ended - died_at} s: {message}"


def one_falls_silent(rank: int, world: int, folder: str, nodes: str):
    start(rank, world, folder, nodes)
    pids = [None] * world
    dist.all_gather_object(pids, os.getpid())
    if rank == 2:
        os.kill(os.getpid(), signal.SIGSTOP)
    else:
        stopped = time.time()
        try:
            ended, message = outcome(lambda: dist.all_reduce(torch.ones(4)))
        finally:
            if rank == 0:
                time.sleep(0.5)
                os.kill(pids[2], signal.SIGCONT)
        assert ended - stopped < LIMIT_S and "rank 2" in message and "no sign of life" in message
    with pytest.raises(pypar.PeerError, match="no sign of life"):  # it comes back too late, and hears why
        while True:
            dist.all_reduce(torch.ones(4))


def test_a_host_that_stops_altogether_ends_the_others(tmp_path):
    run_ranks(one_falls_silent, 3, str(tmp_path), "aab", backend="none")


def two_disagree(rank: int, world: int, folder: str, nodes: str):
    start(rank, world, folder, nodes)
    return outcome(lambda: dist.all_reduce(torch.ones(10 + (rank == 1))))[1]


def test_ranks_of_one_host_that_disagree_are_named_on_all_hosts(tmp_path):
    for message in run_ranks(two_disagree, 4, str(tmp_path), "aabb", backend="none"):
        assert "rank 0 called reduce(float32[10], sum, root 0), rank 1 called reduce(float32[11], " in message


def sizes_disagree(rank: int, world: int, folder: str, nodes: str):
    start(rank, world, folder, nodes)
    sends, expects = [2] * world, [2] * world
    if rank == 0:
        sends[2] = 5
    out, x = torch.empty(sum(expects)), torch.ones(sum(sends))
    return outcome(lambda: dist.all_to_all_single(out, x, expects, sends))[1]


def test_sizes_that_disagree_between_hosts(tmp_path):
    for message in run_ranks(sizes_disagree, 3, str(tmp_path), "aab", backend="none"):
        assert "rank 0 sends 20 bytes to rank 2, which expects 8" in message


def some_leave(rank: int, world: int, folder: str, nodes: str, leavers: list[int]):
    start(rank, world, folder, nodes)
    dist.all_reduce(torch.ones(40_000))
    if rank in leavers:
        dist.destroy_process_group()
        time.sleep(5)
        return None
    stay = [r for r in range(world) if r not in leavers and nodes[r] == nodes[rank]]
    mine = dist.new_group(stay, use_local_synchronization=True)
    # The others have left in good order: no fault. As often on every rank: one that stopped earlier would call another
    # group than its peer.
    for _ in range(100):
        dist.barrier(group=mine)
        if nodes[rank] == "a":
            tensor = torch.full((3,), 7.0)
            dist.send(tensor, 1) if rank == 0 else dist.recv(tensor, 0)
        time.sleep(0.025)
    asked = time.time()
    ended, message = outcome(lambda: dist.all_reduce(torch.ones(40_000)))
    assert ended - asked < LIMIT_S
    return message


@pytest.mark.parametrize("leavers", [[2, 3], [2], [3]])
def test_ranks_that_leave_in_good_order_are_no_fault_until_they_are_called(tmp_path, leavers):
    messages = run_ranks(some_leave, 4, str(tmp_path), "aabb", leavers, backend="none")
    for rank in set(range(4)) - set(leavers):
        assert any(f"rank {r} has left the group" in messages[rank] for r in leavers), messages[rank]


def drop_pending(rank: int, world: int, folder: str, nodes: str):
    start(rank, world, folder, nodes)
    if rank == 0:
        return outcome(lambda: dist.recv(torch.empty(3), 1))[1]
    works = [dist.irecv(torch.empty(3), None, tag=5), dist.all_reduce(torch.ones(3), async_op=True)]
    time.sleep(0.3)
    dist.group.WORLD._get_backend(torch.device("cpu")).abort()
    started = time.time()
    for work in works:
        with pytest.raises(pypar.PeerError, match="rank 1 aborted group"):
            work.wait()
    dist.destroy_process_group()
    assert time.time() - started < LIMIT_S
    time.sleep(1)


def test_abort_ends_the_other_hosts_and_leaves_nothing_that_waits(tmp_path):
    assert "rank 1 aborted group" in run_ranks(drop_pending, 2, str(tmp_path), "ab", backend="none")[0]


def never_taken(rank: int, world: int, folder: str, nodes: str, kind: str):
    start(rank, world, folder, nodes)
    group = dist.new_group(timeout=timedelta(seconds=2))
    if rank == 1:
        time.sleep(5)  # in none of the calls
        return None
    calls = {
        "send": lambda: dist.send(torch.ones(500_000), 1, group=group),
        "recv": lambda: dist.recv(torch.ones(3), 1, group=group),
        "all_reduce": lambda: dist.all_reduce(torch.ones(3), group=group),
    }
    started = time.time()
    with pytest.raises(pypar.PeerError) as caught:
        calls[kind]()
    assert 1.9 < time.time() - started < LIMIT_S
    return str(caught.value)


@pytest.mark.parametrize("kind", ["send", "recv", "all_reduce"])
def test_a_rank_of_another_host_that_never_calls_is_a_timeout(tmp_path, kind):
    message = run_ranks(never_taken, 2, str(tmp_path), "ab", kind, backend="none")[0]
    assert kind in message and "waited 2000 ms" in message and "the timeout of the group" in message, message
