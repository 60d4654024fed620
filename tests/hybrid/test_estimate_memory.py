"""The bytes that pypar.estimate says a rank holds are those of the tensors that it holds."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from hybrid.hybrid_common import make_batches, make_model

from pypar.hybrid import Plan, estimate, parallelize
from pypar.hybrid.dry import Live
from pypar.testing import run_ranks

Case = tuple[str, str, dict[str, Any]]
CASES: list[Case] = [
    ("dp=2 micro_batches=2", "gpt2", {"dropout": 0.1}),
    ("tp=2 sequence_parallel=true loss_parallel=true", "llama", {}),
    ("tp=2 recompute=true", "own", {"tied": True}),
    ("dp=2 zero=1", "llama", {"frozen": True}),
    ("dp=2 zero=2", "own", {"tied": True}),
    ("dp=2 zero=3 micro_batches=2 precision=bfloat16", "llama", {}),
    ("pp=2 micro_batches=4", "gpt2", {"tied": True}),
    ("pp=2 schedule=zbv micro_batches=4", "llama", {}),
    ("pp=2 split=balanced micro_batches=4", "llama", {}),
]


def held(rank: int, world: int, cases: list[Case]) -> list[dict[str, int]]:
    found = []
    for text, kind, options in cases:
        torch.manual_seed(0)
        model, optimizer = parallelize(make_model(kind, **options), Plan.parse(text), lr=1e-3)
        for step, batch in enumerate(make_batches(3, 8)):
            share = model.local_batch(batch)
            if step < 2:
                model.train_step(share)
            else:
                kept, facts = holdings(model, optimizer)
                hook = model.module.register_forward_pre_hook(collect)
                live = Live([*kept, *share.values()], list(model.module.parameters()))
                with live:
                    model.train_step(share)
                hook.remove()
                found.append(facts | {"live": live.peak})
            optimizer.step()
            optimizer.zero_grad()
    return found


def collect(*_: Any) -> None:
    """Cycles would stay until Python looks for them, which is now or then."""
    gc.collect()


def holdings(model: Any, optimizer: Any) -> tuple[list[torch.Tensor], dict[str, int]]:
    """(what stays while a step runs, bytes of it by kind)"""
    parameters, buffers = list(model.module.parameters()), list(model.module.buffers())
    states = [v for state in optimizer.inner.state.values() for v in state.values()]
    if model.zero is not None:
        states = [v for state in model.zero.optimizer.inner.state.values() for v in state.values()]
    here = sum(p.nbytes for p in parameters)
    gradients: list[torch.Tensor] = []
    masters: list[torch.Tensor] = []
    if model.zero is not None:
        flats, reducer = model.zero._flats, model.zero._reducer
        here = sum(flat.full.nbytes for flat in flats) // model.zero.world_size
        masters = [flat.master for flat in flats if flat.master is not flat.own]
        gradients = [bucket.unscaled for bucket in reducer.buckets]
        gradients += [bucket.memory for bucket in reducer.buckets if bucket.memory is not None]
        gradients += [memory for memories in reducer.memories.values() for memory in memories]
    elif model._data is not None:
        gradients = [bucket.flat for bucket in model._data._reducer.buckets]
    engines = [] if model.pipeline is None else model.pipeline._engines.values()
    rings = [channel.ring for engine in engines for channel in engine.channels.values()]
    facts = {
        "parameters": here,
        "gradients": sum(x.nbytes for x in gradients),
        "optimizer": sum(x.nbytes for x in [*states, *masters]),
        "buffers": sum(x.nbytes for x in buffers) + sum(ring.edge.region_bytes for ring in rings),
    }
    kept = [*parameters, *buffers, *gradients, *states, *masters, *(x for r in rings for x in (r.mine, r.theirs))]
    return kept, facts


@pytest.fixture(scope="module")
def measured() -> list[list[dict[str, int]]]:
    """By rank, by case."""
    return run_ranks(held, 2, CASES)


@pytest.mark.parametrize("number", range(len(CASES)), ids=[case[0] for case in CASES])
def test_bytes_held(measured, number):
    text, kind, options = CASES[number]
    for rank in estimate(make_model(kind, **options), text, (8, 12)).ranks:
        here, said = measured[rank.rank][number], rank.memory
        print(rank.rank, here, said)
        for name in ("parameters", "optimizer", "buffers"):
            assert said[name] == here[name], (text, rank.rank, name)
        assert said["gradients"] + said["activations"] == pytest.approx(here["gradients"] + here["live"], rel=0.02)
