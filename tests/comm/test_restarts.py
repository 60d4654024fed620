"""Ranks that torchrun starts anew meet each other in a store that still holds what the dead ones wrote."""

import threading
import time
from datetime import timedelta

import pytest
import torch.distributed as dist

from pypar.mesh import attempt_of

SOON = timedelta(seconds=20)


def start(store, ranks, world_size, delays=()):
    """Names that the ranks find, by rank."""
    found = {}

    def one(rank, delay):
        time.sleep(delay)
        found[rank] = attempt_of(store, rank, world_size, SOON)

    threads = [threading.Thread(target=one, args=(r, dict(delays).get(r, 0.0)), daemon=True) for r in ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(1.0 if len(ranks) < world_size else 20.0)
    return found


@pytest.mark.parametrize("late", [0, 1, 2])
def test_every_start_has_a_name_of_its_own(late):
    store = dist.HashStore()
    names = set()
    for _ in range(5):
        found = start(store, range(3), 3, [(late, 0.1)])
        assert len(found) == 3 and len(set(found.values())) == 1
        names |= set(found.values())
    assert len(names) == 5


def test_after_a_start_in_which_not_all_came():
    store = dist.HashStore()
    assert not start(store, [1, 2], 3), "rank 0 is missing"
    assert len(set(start(store, range(3), 3).values())) == 1


def test_ranks_that_do_not_come():
    with pytest.raises(TimeoutError, match="not all of the 2 ranks have come"):
        attempt_of(dist.HashStore(), 0, 2, timedelta(seconds=0.2))
