"""Pipeline against one process: loss, every gradient, every weight."""

import pytest
import torch
from pipeline_parallel.pipeline_common import STEPS, check, reference, train

from pypar.pipeline_parallel.generators import NAMES
from pypar.testing import run_ranks

SCHEDULES = NAMES


def train_all(rank, world, name, schedules, micro_batches, size):
    return {s: train(rank, world, name, s, micro_batches, size) for s in schedules}


MODELS = ["own", "own tied", "llama", "llama tied", "gpt2", "gpt2 tied"]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("world", "micro_batches", "size"), [(2, 4, 8), (3, 5, 7)])
def test_parity(name, world, micro_batches, size):
    hold_against_one_process(name, world, micro_batches, size)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("world", "micro_batches", "size"), [(2, 5, 7), (3, 6, 12), (4, 8, 8), (4, 9, 13)])
def test_parity_of_more(name, world, micro_batches, size):
    hold_against_one_process(name + (" deep" if world == 4 else ""), world, micro_batches, size)


def hold_against_one_process(name, world, micro_batches, size):
    expected = reference(name, STEPS, size)
    by_rank = run_ranks(train_all, world, name, SCHEDULES, micro_batches, size)
    first = by_rank[0][SCHEDULES[0]]
    for schedule in SCHEDULES:
        found = [of[schedule] for of in by_rank]
        check(found, expected)
        assert found[0][0] == first[0]
        for which in (1, 2):
            assert all(torch.equal(found[0][which][n], t) for n, t in first[which].items()), schedule
