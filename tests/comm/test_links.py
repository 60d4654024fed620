"""The links that carry rows between hosts: how they are made, what they refuse, how a wait in them ends.

PYPAR_NODE_ID makes two "hosts" of this machine.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import pypar
from pypar import backend
from pypar.testing import run_ranks

pytestmark = pytest.mark.skipif(not backend.available(), reason="needs the compiled extension")
DELAY_S = 0.4


def start(rank: int, world: int, folder: str, timeout_s: float = 60) -> None:
    os.environ["PYPAR_NODE_ID"] = "ab"[rank % 2]
    store = dist.FileStore(f"{folder}/store", world)
    dist.init_process_group("pypar", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=timeout_s))


def gather(x: torch.Tensor, chunks: int = 1) -> torch.Tensor:
    """All rows, through a matmul with the identity."""
    name = dist.group.WORLD.group_name
    return torch.ops.pypar.all_gather_matmul(x, [torch.eye(x.shape[1])], [], None, name, num_chunks=chunks)[0]


def expect(got: torch.Tensor, x: torch.Tensor, world: int) -> None:
    want = torch.cat([x - dist.get_rank() + r for r in range(world)])
    torch.testing.assert_close(got, want, rtol=0, atol=0)


def more_than_any_buffer(rank: int, world: int, folder: str) -> None:
    start(rank, world, folder)
    x = torch.full((200_000, 64), float(rank))  # 51 MB each way
    for chunks in (1, 7):
        expect(gather(x, chunks), x, world)


def test_both_directions_carry_more_than_the_buffers_hold(tmp_path):
    run_ranks(more_than_any_buffer, 2, str(tmp_path), backend="none")


def one_is_done_first(rank: int, world: int, folder: str) -> None:
    """Rank 0 has what it needs, and leaves, while rank 1 still multiplies."""
    start(rank, world, folder)
    x, w = torch.full((1000, 1024), float(rank)), torch.ones(8 if rank == 0 else 8000, 1024)
    (y,) = torch.ops.pypar.all_gather_matmul(x, [w], [], None, dist.group.WORLD.group_name, num_chunks=2)
    if rank == 0:
        dist.destroy_process_group()
    want = torch.arange(2.0).repeat_interleave(1000) * 1024
    torch.testing.assert_close(y, want[:, None].expand_as(y), rtol=0, atol=0)


def test_a_rank_that_leaves_after_the_call_ends_nothing(tmp_path):
    run_ranks(one_is_done_first, 2, str(tmp_path), backend="none")


def listening_ports() -> set[int]:
    """Of this process."""
    mine = set()
    for link in Path("/proc/self/fd").iterdir():
        try:
            mine.add(os.readlink(link))
        except OSError:  # the folder's own
            continue
    ports = set()
    for table in ("tcp", "tcp6"):
        for line in Path("/proc/self/net", table).read_text().splitlines()[1:]:
            _, local, _, state, *rest = line.split()
            if state == "0A" and f"socket:[{rest[5]}]" in mine:
                ports.add(int(local.split(":")[1], 16))
    return ports


def a_stranger_calls(rank: int, world: int, folder: str) -> int:
    start(rank, world, folder)
    dist.barrier()
    before, sockets, called = listening_ports(), [], Path(folder, "called")

    def call() -> None:
        """A silent one and one that guesses, at whatever this rank begins to listen at."""
        while not (new := listening_ports() - before):
            time.sleep(0.001)
        for said in (b"", b"x" * 16):
            for host in (socket.gethostname(), "127.0.0.1"):  # it listens at one of the two
                try:
                    sockets.append(socket.create_connection((host, min(new)), 2))
                    sockets[-1].sendall(said)
                    break
                except OSError:
                    continue
        called.touch()

    stranger = threading.Thread(target=call)
    if rank == 0:
        stranger.start()
    while rank == 1 and not called.exists():
        time.sleep(0.01)
    x = torch.full((4, 3), float(rank))
    expect(gather(x), x, world)
    if rank == 0:
        stranger.join()
    return len(sockets)


def test_a_stranger_that_connects_changes_nothing(tmp_path):
    num_strangers, _ = run_ranks(a_stranger_calls, 2, str(tmp_path), backend="none")
    assert num_strangers == 2


def interface_is_wrong(rank: int, world: int, folder: str) -> str:
    start(rank, world, folder)
    os.environ["GLOO_SOCKET_IFNAME"] = "nowhere7"
    with pytest.raises(pypar.PeerError) as caught:
        gather(torch.ones(4, 3))
    return str(caught.value)


def test_an_interface_that_is_not_there_is_named(tmp_path):
    for message in run_ranks(interface_is_wrong, 2, str(tmp_path), backend="none"):
        assert "GLOO_SOCKET_IFNAME is 'nowhere7'" in message, message


def one_is_interrupted(rank: int, world: int, folder: str, connected: bool) -> tuple[float, str]:
    start(rank, world, folder)
    x = torch.full((4, 3), float(rank))
    if connected:
        gather(x)
    dist.barrier()
    if rank == 0:
        with pytest.raises(pypar.PeerError) as caught:
            dist.recv(torch.empty(3), 1)
        return 0.0, str(caught.value)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sent: list[float] = []

    def send() -> None:
        sent.append(time.monotonic())
        os.kill(os.getpid(), signal.SIGINT)

    threading.Timer(DELAY_S, send).start()
    with pytest.raises(KeyboardInterrupt):
        gather(x)
    took = time.monotonic() - sent[0]
    with pytest.raises(pypar.PeerError, match="interrupted"):
        gather(x)
    time.sleep(1)  # the other host hears of it from this process
    return took, ""


@pytest.mark.parametrize("connected", [False, True], ids=["while they connect", "later"])
def test_ctrl_c_ends_the_wait(connected, tmp_path):
    (_, message), (took, _) = run_ranks(one_is_interrupted, 2, str(tmp_path), connected, backend="none")
    assert took < 1
    assert "rank 1" in message and "was interrupted" in message, message


def one_does_not_come(rank: int, world: int, folder: str, connected: bool) -> str:
    start(rank, world, folder, timeout_s=2)
    x = torch.full((4, 3), float(rank))
    if connected:
        gather(x)
    if rank == 0:
        time.sleep(4)
        call: Callable[[], object] = lambda: dist.all_reduce(torch.ones(3))  # noqa: E731
    else:
        call = lambda: gather(x)  # noqa: E731
    with pytest.raises(pypar.PeerError) as caught:
        call()
    return str(caught.value)


@pytest.mark.parametrize("connected", [False, True], ids=["while they connect", "later"])
def test_a_rank_that_does_not_come(connected, tmp_path):
    for message in run_ranks(one_does_not_come, 2, str(tmp_path), connected, backend="none"):
        assert "rank 1 of group '0' in all_gather of rows" in message and "waited 2000 ms" in message, message
