"""Models on meta under any plan: the weights of one process, and no rank ever holds the whole model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hybrid.hybrid_common import make_batches, make_model
from torch import nn

import pypar
from pypar.testing import run_ranks
from pypar.zero.units import units_of

PLANS = [
    "dp=4 zero=0",
    "tp=2 dp=2 zero=3",
    "pp=2 dp=2 zero=1 micro_batches=2",
    "pp=2 tp=2 micro_batches=2",
    "tp=4",
    "dp=4 zero=3 replicate=2",
]
KINDS = {"own": {"tied": True}, "llama": {"heads": 6, "frozen": True}, "gpt2": {"tied": True}}


def _on_meta(kind: str) -> nn.Module:
    with torch.device("meta"):
        return make_model(kind, layers=2, **KINDS[kind])


def _alone(kind: str) -> nn.Module:
    """As torch makes one of a model on meta."""
    model = _on_meta(kind).to_empty(device="cpu")
    if hasattr(model, "tie_weights"):
        model.tie_weights()
    elif KINDS[kind].get("tied"):
        model.lm_head.weight = model.embed.weight
    torch.manual_seed(11)
    draw = getattr(model, "_init_weights", lambda m: m.reset_parameters() if hasattr(m, "reset_parameters") else None)
    with torch.no_grad():
        model.apply(draw)
    return model


def _steps(model: Any, optimizer: Any) -> list[float]:
    losses = []
    for batch in make_batches(2, 8):
        losses.append(float(model.train_step(model.local_batch(batch))))
        optimizer.clip_grad_norm_(1.0)
        optimizer.step()
        optimizer.zero_grad()
    return losses


def _check(rank: int, world: int, plans: list[str], kind: str, state: str | None) -> list[Any]:
    found = []
    for plan in plans:
        torch.manual_seed(11 if rank == 0 else 100 + rank)
        # Other ranks' state dicts have the shapes alone.
        init = None if state is None else torch.load(state, map_location="cpu" if rank == 0 else "meta")
        full = _on_meta(kind)
        model, optimizer = pypar.parallelize(full, plan, torch.optim.AdamW, lr=1e-3, init=init)
        assert not any(t.is_meta for t in (*model.parameters(), *model.buffers()))
        weights = {name: value.clone() for name, value in pypar.gather_state(model).items()}
        found.append((weights, _steps(model, optimizer)))
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("from_state", [False, True], ids=["drawn", "state dict"])
def test_weights_of_one_process_whatever_the_plan(tmp_path: Path, kind: str, from_state: bool):
    wanted = _alone(kind)
    state = str(tmp_path / "state.pt") if from_state else None
    if state:
        torch.save(
            {n: t for n, t in wanted.state_dict().items() if not n.startswith("lm_head") or kind == "llama"}, state
        )
    found = run_ranks(_check, 4, PLANS, kind, state)[0]
    losses = run_ranks(_plain, 1, kind)[0]
    for plan, (weights, other) in zip(PLANS, found, strict=True):
        for name, value in wanted.state_dict().items():
            assert torch.equal(weights[name], value), f"{plan}: {name}"
        torch.testing.assert_close(other, losses, rtol=1e-5, atol=1e-6, msg=plan)


def _plain(rank: int, world: int, kind: str) -> list[float]:
    return _steps(*pypar.parallelize(_alone(kind), "dp=1", torch.optim.AdamW, lr=1e-3))


def _watched(rank: int, world: int) -> tuple[int, int, int]:
    """(most elements of the full model that had values at a time, of the root's and the largest unit, of all)"""
    seen: list[nn.Module] = []
    most = 0

    def draw(module: nn.Module) -> None:
        nonlocal most
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
        seen.append(module)
        there = {id(p): p.numel() for m in seen for p in m.parameters() if not p.is_meta}
        most = max(most, sum(there.values()))

    full = _on_meta("own")
    units = [sum(p.numel() for p in unit.parameters) for unit in units_of(full)]
    pypar.parallelize(full, "tp=2", init=draw)
    return most, units[0] + max(units), sum(units)


def test_one_unit_has_values_at_a_time():
    """Beside the root's, of which the embedding is drawn first and other modules last."""
    most, two_units, total = run_ranks(_watched, 2)[0]
    assert 0 < most <= two_units < total


def _refused(rank: int, world: int) -> list[str]:
    said = []
    real = make_model("own", layers=2)
    wrong = {name: value for name, value in real.state_dict().items() if "q_proj" not in name}
    for model, init in ((_on_meta("own"), wrong), (_on_meta("own"), "xavier"), (real, wrong)):
        with pytest.raises(ValueError) as raised:
            pypar.parallelize(model, "tp=2", init=init)
        said.append(str(raised.value))
    return said


def test_wrong_init_is_refused_on_every_rank():
    for lacks, unknown, real in run_ranks(_refused, 2):
        assert lacks == "pypar.parallelize: the state dict of init= has no 'blocks.0.attention.q_proj.weight'"
        assert unknown.startswith("pypar.parallelize: init='xavier'; give 'reset_parameters', a function")
        assert "init= is for a model on the meta device" in real
