"""A rank of a plan dies, stalls, raises, or has a gradient that is not finite: what the others see."""

from __future__ import annotations

import os
import signal
import time

import pytest
import torch
from hybrid.hybrid_common import make_batches, make_model
from torch import nn

import pypar
from pypar.testing import run_ranks

PLANS = [
    "dp=2 tp=2 zero=1",
    "dp=4 zero=3",
    "pp=2 dp=2 zero=2 schedule=zbv micro_batches=4",
    "pp=2 tp=2 schedule=zbh1 micro_batches=4",
]


class Broken(Exception):
    pass


def _break(model: nn.Module, how: str) -> None:
    """In the third backward that reaches the first weight of this rank."""
    calls = []

    def hook(_grad: torch.Tensor) -> None:
        calls.append(1)
        if len(calls) == 3:
            if how == "dies":
                os.kill(os.getpid(), signal.SIGKILL)
            raise Broken("on purpose")

    next(p for p in model.parameters() if p.dim() == 1).register_hook(hook)


def _fails(rank: int, world: int, plan: str, how: str, who: int) -> tuple[str, float]:
    model, optimizer = pypar.parallelize(make_model("own"), plan)
    if rank == who:
        _break(model, how)
    started = time.monotonic()
    try:
        for batch in make_batches(6, 8):
            model.train_step(model.local_batch(batch))
            started = time.monotonic()
            optimizer.clip_grad_norm_(1.0)
            optimizer.step()
            optimizer.zero_grad()
    except Exception as error:
        return f"{type(error).__name__}: {error}", time.monotonic() - started
    return "nothing", 0.0


@pytest.mark.parametrize("plan", PLANS)
def test_when_a_rank_dies_every_other_one_raises(plan: str):
    *found, failures = run_ranks(_fails, 4, plan, "dies", 3, timeout_s=60, limit_s=50, expect_failure=True)
    assert set(failures) == {3} and "exit code -9" in failures[3]
    for text, seconds in found[:3]:
        assert text.startswith("PeerError"), text
        assert seconds < 20, text


@pytest.mark.parametrize("plan", PLANS)
def test_when_a_rank_raises_every_other_one_says_why(plan: str):
    found = run_ranks(_fails, 4, plan, "raises", 1, timeout_s=60, limit_s=50)
    assert found[1][0] == "Broken: on purpose"
    for rank in (0, 2, 3):
        assert found[rank][0].startswith("PeerError"), found[rank]
        assert "on purpose" in found[rank][0], found[rank]


def _not_finite(rank: int, world: int, plan: str) -> tuple[int, bool]:
    model, optimizer = pypar.parallelize(make_model("own"), plan, torch.optim.SGD, lr=0.1)
    first, *batches = make_batches(3, 8)
    model.train_step(model.local_batch(first))
    optimizer.step()
    optimizer.zero_grad()
    before = {n: p.detach().clone() for n, p in model.module.named_parameters()}
    poisoned = next(p for n, p in model.module.named_parameters() if n.startswith("blocks."))
    handle = poisoned.register_hook(lambda grad: grad * float("nan")) if rank == 0 else None
    model.train_step(model.local_batch(batches[0]))
    optimizer.step()
    optimizer.zero_grad()
    same = all(torch.equal(p, before[n]) for n, p in model.module.named_parameters())
    if handle is not None:
        handle.remove()
    model.train_step(model.local_batch(batches[1]))
    optimizer.step()
    changed = any(not torch.equal(p, before[n]) for n, p in model.module.named_parameters())
    return optimizer.inner.num_skipped, same and changed


@pytest.mark.parametrize(
    "plan", ["dp=2 tp=2 zero=1", "pp=2 dp=2 zero=3 micro_batches=2", "pp=2 tp=2 zero=1 micro_batches=2"]
)
def test_a_gradient_that_is_not_finite_leaves_the_step_out_on_every_rank(plan: str):
    assert run_ranks(_not_finite, 4, plan) == [(1, True)] * 4
