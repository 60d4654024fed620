"""The bytes that pypar.estimate says a step sends are those that it sends, call by call."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from hybrid.hybrid_common import make_batches, make_model

from pypar.hybrid import Plan, parallelize
from pypar.hybrid.estimate import CONTROL, estimate
from pypar.hybrid.traffic import Traffic
from pypar.testing import run_ranks

# (plan, kind of model, settings of it, samples)
Case = tuple[str, str, dict[str, Any], int]
DROPOUT = {"dropout": 0.1}
CASES: list[Case] = [
    ("dp=4", "gpt2", DROPOUT, 8),
    ("tp=4 sequence_parallel=true", "llama", {"vocab": 99}, 9),
    ("pp=4 micro_batches=8", "own", {"tied": True}, 9),
    ("dp=4 zero=1 micro_batches=2", "llama", {"frozen": True}, 11),
    ("dp=2 tp=2 zero=3 micro_batches=2", "own", {"tied": True}, 9),
    ("dp=4 zero=2 replicate=2", "gpt2", {"tied": True}, 8),
    ("pp=2 tp=2 schedule=zbh1 micro_batches=4 loss_parallel=true", "gpt2", DROPOUT, 8),
    ("pp=2 dp=2 zero=2 schedule=zbv micro_batches=4 split=balanced", "own", {"tied": True}, 9),
    ("pp=2 dp=2 zero=3 precision=bfloat16 micro_batches=2 reduce=once", "llama", {"tied": True}, 8),
    ("pp=2 tp=2 schedule=dualpipev micro_batches=4 sequence_parallel=true recompute=true", "gpt2", DROPOUT, 32),
    ("dp=2 tp=2 recompute=true order=tp+dp+pp", "llama", {"heads": 6, "dropout": 0.1}, 7),
    ("pp=2 dp=2 schedule=interleaved micro_batches=4", "gpt2", {"tied": True, "frozen": True}, 8),
]  # fmt: skip


def step_traffic(rank: int, world: int, cases: list[Case]) -> list[dict[tuple[str, str], int]]:
    found = []
    for text, kind, options, samples in cases:
        torch.manual_seed(0)
        model, optimizer = parallelize(make_model(kind, **options), Plan.parse(text), lr=1e-3)
        axes = model.axes
        groups = {"pp": axes.pp_group, "dp": axes.dp_group, "tp": axes.tp_group}
        names = {group.group_name: axis for axis, group in groups.items() if group is not None}
        names |= {g.group_name: "dp" for g in (axes.shard_group, axes.replicate_group) if g is not None}
        assert dist.group.WORLD is not None
        names[dist.group.WORLD.group_name] = CONTROL
        for step, batch in enumerate(make_batches(3, samples, options.get("vocab", 97))):
            traffic = Traffic(model.pipeline)
            with traffic:
                model.train_step(model.local_batch(batch))
                optimizer.step()
                optimizer.zero_grad()
            if step == 2:
                found.append(traffic.by_axis(names))
    return found


@pytest.fixture(scope="module")
def measured() -> list[list[dict[tuple[str, str], int]]]:
    """By rank, by case."""
    return run_ranks(step_traffic, 4, CASES)


@pytest.mark.parametrize("number", range(len(CASES)), ids=[case[0] for case in CASES])
def test_bytes_sent_are_exact(measured, number):
    text, kind, options, samples = CASES[number]
    found = estimate(make_model(kind, **options), text, (samples, 12))
    for rank in found.ranks:
        said = {(axis, op): count for axis, ops in rank.sent.items() for op, count in ops.items()}
        wanted = measured[rank.rank][number]
        if max(found.plan.pp, found.plan.dp, found.plan.tp) == found.plan.world_size:  # one group serves both
            said, wanted = over_axes(said), over_axes(wanted)
        assert said == wanted, f"rank {rank.rank} of {text}"


def over_axes(sent: dict[tuple[str, str], int]) -> dict[str, int]:
    found: dict[str, int] = {}
    for (_, op), count in sent.items():
        found[op] = found.get(op, 0) + count
    return found
