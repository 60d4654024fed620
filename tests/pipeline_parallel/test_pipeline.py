"""Pipeline against one process: loss, every gradient, every weight."""

import pytest
import torch
from pipeline_parallel.pipeline_common import SETTINGS, batches, build, next_token_loss, reference

import pypar.pipeline_parallel
from pypar.pipeline_parallel.generators import NAMES
from pypar.testing import run_ranks

STEPS = 3
SCHEDULES = NAMES


def train(rank, world, name, schedule, micro_batches, size):
    pipeline = pypar.pipeline_parallel.Pipeline(build(name), schedule=schedule, micro_batches=micro_batches)
    optimizer = torch.optim.AdamW(pipeline.parameters(), **SETTINGS)
    losses = []
    for batch in batches(name, STEPS, size):
        optimizer.zero_grad()
        losses.append(pipeline.train_step(batch, None if isinstance(batch, dict) else next_token_loss).item())
        optimizer.step()
    return losses, pipeline.full_gradients(), pipeline.full_state_dict()


def check(found, expected):
    losses, grads, state = found[0]
    want_losses, want_grads, want_state = expected
    assert all(f[0] == losses for f in found)
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(want_losses), rtol=1e-5, atol=1e-6)
    assert set(grads) == set(want_grads) and set(state) == set(want_state)
    for n, want in want_grads.items():
        torch.testing.assert_close(grads[n], want, rtol=1e-5, atol=1e-6, msg=lambda m, n=n: f"gradient of {n}: {m}")
    for n, want in want_state.items():
        torch.testing.assert_close(state[n], want, rtol=1e-5, atol=1e-6, msg=lambda m, n=n: f"{n}: {m}")


def train_all(rank, world, name, schedules, micro_batches, size):
    return {s: train(rank, world, name, s, micro_batches, size) for s in schedules}


@pytest.mark.parametrize("name", ["own", "own tied", "llama", "llama tied", "gpt2", "gpt2 tied"])
@pytest.mark.parametrize(("world", "micro_batches", "size"), [(2, 4, 8), (3, 5, 7)])
def test_parity(name, world, micro_batches, size):
    expected = reference(name, STEPS, size)
    by_rank = run_ranks(train_all, world, name, SCHEDULES, micro_batches, size)
    first = by_rank[0][SCHEDULES[0]]
    for schedule in SCHEDULES:
        found = [of[schedule] for of in by_rank]
        check(found, expected)
        assert found[0][0] == first[0]
        for which in (1, 2):
            assert all(torch.equal(found[0][which][n], t) for n, t in first[which].items()), schedule
