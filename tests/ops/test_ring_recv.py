"""ring_recv: views of a slot, credits, back-pressure; peers that die or stall."""

import os
import signal
import time

import pytest
import torch
import torch.distributed as dist

from pypar.pipeline_parallel.ring import Edge, make_rings
from pypar.testing import run_ranks


def ring_of(num_slots=3, slot_bytes=4096):
    return make_rings([Edge(0, 1, num_slots, slot_bytes)], dist.group.WORLD).get(0)


def views(rank, world):
    ring = ring_of(num_slots=2)
    if rank == 0:
        for call in range(3):
            ring.send([torch.full((4,), float(call))], call)
        dist.barrier()
    else:
        (first,), _ = ring.recv()
        (second,), _ = ring.recv()
        keep = first[1:]  # a view of a view holds the slot as well
        del first
        time.sleep(0.3)
        assert torch.equal(keep, torch.zeros(3))  # the sender waits: the third lies where `keep` lies
        del second
        time.sleep(0.3)
        assert torch.equal(keep, torch.zeros(3))
        del keep
        (third,), tag = ring.recv()
        assert tag == 2 and torch.equal(third, torch.full((4,), 2.0))
        dist.barrier()


def test_a_slot_goes_back_with_the_last_view_of_it():
    run_ranks(views, 2)


def killed(rank, world, receiver_dies):
    ring = ring_of(num_slots=1)
    if rank == (1 if receiver_dies else 0):
        os.kill(os.getpid(), signal.SIGKILL)
    while True:
        if rank == 0:
            ring.send([torch.ones(4)], 0)
        else:
            ring.recv()


@pytest.mark.parametrize("receiver_dies", [True, False])
def test_a_peer_that_dies(receiver_dies):
    *_, failures = run_ranks(killed, 2, receiver_dies, expect_failure=True)
    survivor = 0 if receiver_dies else 1
    assert "PeerError" in failures[survivor] and f"rank {1 - survivor}" in failures[survivor]


def full(rank, world):
    ring = ring_of(num_slots=2)
    if rank == 0:
        for call in range(3):
            ring.send([torch.ones(4)], call)
    else:
        kept = [ring.recv() for _ in range(2)]
        time.sleep(6)
        del kept


def test_no_free_slot_within_the_timeout():
    *_, failures = run_ranks(full, 2, timeout_s=2, expect_failure=True)
    assert "all 2 slots hold what it has not given back" in failures[0]
