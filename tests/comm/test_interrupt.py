"""Ctrl-C ends a wait in C++: KeyboardInterrupt here at once, PeerError that names this rank on every peer."""

from __future__ import annotations

import os
import signal
import threading
import time
from contextlib import contextmanager
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as symm

import pypar
from pypar.testing import run_ranks

DELAY_S = 0.4


@contextmanager
def signal_to_myself(number=signal.SIGINT, handler=signal.default_int_handler):
    """After DELAY_S this process gets the signal, as from a terminal. Yields a function: seconds since then."""
    signal.signal(number, handler)
    sent = []

    def send():
        sent.append(time.monotonic())
        os.kill(os.getpid(), number)

    timer = threading.Timer(DELAY_S, send)
    timer.start()
    try:
        yield lambda: time.monotonic() - sent[0]
    finally:
        timer.join()
        signal.signal(number, signal.SIG_IGN)


def waits(world):
    """Ways to wait for a peer that does not come."""
    x = torch.ones(1000)
    t = symm.empty(1000, dtype=torch.float32, device="cpu")
    handle = symm.rendezvous(t, dist.group.WORLD.group_name)

    def behind_the_worker():
        dist.all_reduce(x, async_op=True)
        time.sleep(0.1)  # the worker thread has begun it
        dist.all_reduce(torch.ones(3))

    def last_of_two():
        dist.all_reduce(x, async_op=True)
        dist.all_reduce(torch.ones(3), async_op=True).wait()

    return {
        "op": lambda: torch.ops.pypar.all_reduce_(x, "sum", dist.group.WORLD.group_name),
        "all_reduce": lambda: dist.all_reduce(x),
        "barrier": lambda: dist.barrier(),
        "monitored_barrier": lambda: dist.group.WORLD.monitored_barrier(timedelta(seconds=60)),
        "async": lambda: dist.all_reduce(x, async_op=True).wait(),
        "async with a timeout": lambda: dist.all_reduce(x, async_op=True).wait(timedelta(seconds=60)),
        "behind the worker": behind_the_worker,
        "last of two": last_of_two,
        "recv": lambda: dist.recv(x, 1 - dist.get_rank()),
        "recv from any": lambda: dist.recv(x),
        "send": lambda: dist.send(torch.ones(10_000_000), 1 - dist.get_rank()),
        "destroy": lambda: (dist.all_reduce(x, async_op=True), dist.destroy_process_group()),
        "symmetric barrier": lambda: handle.barrier(0, 60_000),
        "wait_signal": lambda: handle.wait_signal(1 - dist.get_rank(), 0, 60_000),
        "rendezvous": lambda: symm.rendezvous(
            symm.empty(10, dtype=torch.float32, device="cpu"), dist.group.WORLD.group_name
        ),
    }


KINDS = [
    "op",
    "all_reduce",
    "barrier",
    "monitored_barrier",
    "async",
    "async with a timeout",
    "behind the worker",
    "last of two",
    "recv",
    "recv from any",
    "send",
    "destroy",
    "symmetric barrier",
    "wait_signal",
    "rendezvous",
]
# The peer is in a wait of its own, another one, so that neither gets anywhere.
PEER = {"recv": "wait_signal", "recv from any": "wait_signal", "send": "wait_signal"}


def one_is_interrupted(rank, world, kind):
    calls = waits(world)
    dist.barrier()
    if rank == 1:
        with signal_to_myself() as since:
            with pytest.raises(KeyboardInterrupt):
                calls[kind]()
            seconds = since()
        if kind != "destroy":
            with pytest.raises(pypar.PeerError, match=r"rank 1 of group .* was interrupted"):
                dist.all_reduce(torch.ones(2))
        return seconds, ""
    start = time.monotonic()
    with pytest.raises(pypar.PeerError) as caught:
        calls[PEER.get(kind, "recv")]()
    return time.monotonic() - start, str(caught.value)


@pytest.mark.parametrize("kind", KINDS)
def test_interrupt_ends_the_wait_and_the_group(kind):
    (peer_s, message), (own_s, _) = run_ranks(one_is_interrupted, 2, kind, timeout_s=20)
    assert "rank 1 of group '0' was interrupted" in message
    assert own_s < 2 and peer_s < DELAY_S + 5


def interrupted_while_connecting(rank, world):
    """No group yet that could be ended: the peer learns of it when it wants to talk to us."""
    if rank == 1:
        with signal_to_myself() as since:
            with pytest.raises(KeyboardInterrupt):
                dist.new_group([0, 1])
            seconds = since()
        return seconds
    time.sleep(DELAY_S + 0.8)
    return None


def test_interrupt_ends_the_creation_of_a_group():
    assert run_ranks(interrupted_while_connecting, 2)[1] < 2


class Stopped(Exception):
    pass


def handler_decides(rank, world):
    def stop(number, frame):
        raise Stopped("by a handler")

    flags = []
    if rank == 1:
        with signal_to_myself(signal.SIGUSR1, lambda *_: flags.append(1)) as since:
            dist.recv(torch.ones(1), 0)  # a handler that returns lets the wait go on
            assert since() > 0.3 and flags == [1]
        with signal_to_myself(signal.SIGUSR1, stop), pytest.raises(Stopped, match="by a handler"):
            dist.recv(torch.ones(1), 0)
        return
    time.sleep(DELAY_S + 0.5)
    dist.send(torch.ones(1), 1)
    with pytest.raises(pypar.PeerError, match=r"rank 1 of group .* was interrupted in recv"):
        dist.recv(torch.ones(1), 1)


def test_the_handler_decides_whether_the_wait_ends():
    run_ranks(handler_decides, 2)


def handler_calls_the_group(rank, world, kind):
    def handler(number, frame):
        if kind == "destroy":
            dist.destroy_process_group()
            raise SystemExit(3)
        dist.all_reduce(torch.ones(4))

    if rank == 1:
        expected = SystemExit if kind == "destroy" else pypar.PeerError
        with signal_to_myself(signal.SIGTERM, handler), pytest.raises(expected) as caught:
            dist.all_reduce(torch.ones(3))
        return str(caught.value)
    with pytest.raises(pypar.PeerError, match="rank 1"):
        dist.recv(torch.ones(3), 1)
    return None


def test_a_handler_that_destroys_the_group_does_not_wait_for_the_call_it_interrupts():
    assert run_ranks(handler_calls_the_group, 2, "destroy")[1] == "3"


def test_a_handler_that_calls_the_group_it_interrupts_is_refused():
    assert "signal handler" in run_ranks(handler_calls_the_group, 2, "call")[1]


def freeing_beside_a_wait(rank, world):
    """A thread that holds the interpreter frees symmetric memory while the main thread waits and looks for signals."""
    group = dist.group.WORLD.group_name

    def make():
        t = symm.empty(1000, dtype=torch.float32, device="cpu")
        symm.rendezvous(t, group)
        return t

    kept = [make() for _ in range(20)]
    dist.barrier()
    if rank == 0:
        time.sleep(1)
        dist.all_reduce(torch.ones(1))
        return
    thread = threading.Thread(target=lambda: [(kept.pop(), time.sleep(0.02)) for _ in range(20)])
    thread.start()
    dist.all_reduce(torch.ones(1))
    thread.join()
    assert not kept


def test_freeing_symmetric_memory_beside_a_wait_does_not_block_it():
    run_ranks(freeing_beside_a_wait, 2, timeout_s=20)


def no_waits_left_behind(rank, world):
    """Interrupted in an asynchronous call that the worker runs: nothing hangs at the end of the process."""
    if rank == 1:
        work = dist.all_reduce(torch.ones(10), async_op=True)
        time.sleep(0.1)
        with signal_to_myself(), pytest.raises(KeyboardInterrupt):
            work.wait()
        with pytest.raises(pypar.PeerError, match="was interrupted"):
            work.wait()
        return
    with pytest.raises(pypar.PeerError, match=r"rank 1 of group .* was interrupted in"):
        dist.recv(torch.ones(3), 1)


def test_the_interrupted_work_itself_ends_with_an_error():
    run_ranks(no_waits_left_behind, 2)
