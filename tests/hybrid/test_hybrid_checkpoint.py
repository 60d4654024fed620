"""Saved under one plan and loaded under another: the same bits, and the same run from there on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hybrid.hybrid_common import make_batches, make_model
from torch import nn

import pypar
from pypar.testing import run_ranks

# Of each global batch the same four pieces everywhere.
PLANS = {
    4: [
        "dp=4 zero=0",
        "dp=4 zero=3",
        "tp=4 micro_batches=4",  # 6 heads, and in llama 3 of keys and values, on 4 ranks: uneven, with copies
        "pp=2 dp=2 zero=1 micro_batches=2",
        "pp=2 tp=2 micro_batches=4 order=tp+dp+pp",
        "dp=2 tp=2 zero=2 micro_batches=2",
    ],
    2: ["dp=2 zero=1 micro_batches=2"],
    1: ["micro_batches=4"],
}
HALF = {
    4: ["pp=2 dp=2 zero=1 precision=bfloat16 micro_batches=2", "dp=4 zero=3 replicate=2 precision=bfloat16"],
    2: ["tp=2 micro_batches=4"],
}


def _train(model: Any, optimizer: Any, batches: list[Any]) -> list[float]:
    losses = []
    for batch in batches:
        losses.append(float(model.train_step(model.local_batch(batch))))
        optimizer.clip_grad_norm_(1.0)
        optimizer.step()
        optimizer.zero_grad()
    return losses


def _made(plan: str, kind: str, dropout: float) -> tuple[Any, Any]:
    module = make_model(kind, layers=2, tied=True, heads=6, dropout=dropout)
    model, optimizer = pypar.parallelize(module, plan, torch.optim.AdamW, lr=1e-3, eps=1e-5)
    return model.train(), optimizer


def _state(model: Any, optimizer: Any) -> dict[str, torch.Tensor]:
    """Of rank 0: weights, and states of the optimizer."""
    states = pypar.gather_optimizer_state(model, optimizer)
    found = {f"{name} {key}": value for name, each in states.items() for key, value in each.items()}
    return found | {name: value.clone() for name, value in pypar.gather_state(model).items()}


def _save_each(rank: int, world: int, folder: str, plans: list[str], kind: str, dropout: float = 0.0) -> list[Any]:
    found = []
    batches = make_batches(6, 8)
    for plan in plans:
        torch.manual_seed(3 + rank)
        model, optimizer = _made(plan, kind, dropout)
        _train(model, optimizer, batches[:3])
        for group in optimizer.param_groups:
            group["lr"] = 5e-4
        pypar.save(f"{folder}/{plan}", model, optimizer, extra={"step": 3, "plan": plan})
        found.append((_state(model, optimizer), _train(model, optimizer, batches[3:])))
    return found


def _load_each(
    rank: int, world: int, folder: str, loads: list[tuple[str, list[str]]], kind: str, dropout: float = 0.0
) -> Any:
    """loads: (plan, those that it loads), one after the other into one model: what was there before is gone."""
    found = []
    batches = make_batches(6, 8)
    for plan, sources in loads:
        model, optimizer = _made(plan, kind, dropout)
        for source in sources:
            torch.manual_seed(100 * rank)
            extra = pypar.load(f"{folder}/{source}", model, optimizer)
            assert extra == {"step": 3, "plan": source}
            assert [group["lr"] for group in optimizer.param_groups] == [5e-4]
            found.append((plan, source, _state(model, optimizer), _train(model, optimizer, batches[3:])))
    return found


def _differences(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> list[str]:
    wrong = [f"{name} is missing" for name in wanted if name not in found]
    wrong += [f"{name} is not saved" for name in found if name not in wanted]
    return wrong + [name for name in found if name in wanted and not torch.equal(found[name], wanted[name])]


def _first_name_alone(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Without what differs in form between layouts: the second name of the tied weight."""
    return {name: value for name, value in state.items() if not name.startswith("lm_head.weight")}


@pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["some", "every"])
def test_every_plan_loads_what_others_saved(tmp_path: Path, every: bool):
    """Each plan loads its own and two others' checkpoints; or, slow, all of them, of a model of Hugging Face."""
    kind = "llama" if every else "own"
    saved: dict[str, tuple[dict[str, torch.Tensor], list[float]]] = {}
    for world, plans in PLANS.items():
        saved |= zip(plans, run_ranks(_save_each, world, str(tmp_path), plans, kind)[0], strict=True)
    names = list(saved)
    loads = {p: names if every else [names[(n + k) % len(names)] for k in (3, 1, 0)] for n, p in enumerate(names)}
    wrong = []
    for world, plans in PLANS.items():
        mine = [(plan, loads[plan]) for plan in plans]
        for plan, source, state, losses in run_ranks(_load_each, world, str(tmp_path), mine, kind)[0]:
            wanted, next_losses = saved[source]
            what = f"{source} -> {plan}: "
            wrong += [what + each for each in _differences(_first_name_alone(state), _first_name_alone(wanted))[:2]]
            if losses != (next_losses if plan == source else pytest.approx(next_losses, rel=1e-6)):
                wrong.append(f"{what}losses {losses}, uninterrupted {next_losses}")
    assert not wrong, "\n".join(wrong)


def test_dropout_goes_on_where_it_was(tmp_path: Path):
    ((_, wanted),) = run_ranks(_save_each, 2, str(tmp_path), ["dp=2 zero=3 micro_batches=2"], "own", 0.1)[0]
    for world, plan in ((2, "dp=2 zero=3 micro_batches=2"), (1, "micro_batches=4")):
        loads = [(plan, ["dp=2 zero=3 micro_batches=2"])]
        ((_, _, _, losses),) = run_ranks(_load_each, world, str(tmp_path), loads, "own", 0.1)[0]
        assert losses == (wanted if world == 2 else pytest.approx(wanted, rel=1e-6)), plan


def test_masters_of_bfloat16_plans_are_kept(tmp_path: Path):
    (first, _), (second, _) = run_ranks(_save_each, 4, str(tmp_path), HALF[4], "own")[0]
    saved = dict(zip(HALF[4], (first, second), strict=True))
    wrong = []
    for plan, source, state, _ in run_ranks(_load_each, 4, str(tmp_path), [(plan, HALF[4]) for plan in HALF[4]], "own")[
        0
    ]:
        assert any(name.endswith(" master") for name in state)
        found, wanted = _first_name_alone(state), _first_name_alone(saved[source])
        wrong += [f"{source} -> {plan}: {each}" for each in _differences(found, wanted)[:2]]
    # A float32 model takes the masters as its weights.
    for plan, source, state, _ in run_ranks(_load_each, 2, str(tmp_path), [(HALF[2][0], HALF[4])], "own")[0]:
        masters = {n.removesuffix(" master"): v for n, v in saved[source].items() if n.endswith(" master")}
        assert masters and all(value.dtype == torch.float32 for value in masters.values())
        wrong += [f"{source} -> {plan}: {n}" for n, v in masters.items() if not torch.equal(state[n], v)]
    assert not wrong, "\n".join(wrong)


def _alone(rank: int, world: int, folder: str) -> list[tuple[str, list[str]]]:
    """The methods by themselves, from a plain module's checkpoint, and back into a plain one."""
    reference, plain_optimizer = _plain()
    pypar.load(f"{folder}/plain", reference, plain_optimizer)
    wanted = _tensors(reference, plain_optimizer)
    found = []
    for kind in ("DataParallel", "Zero", "Pipeline", "tensor_parallel"):
        module = make_model("own", layers=2, tied=True)
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.zero_()
        model: Any
        if kind == "Zero":
            model = pypar.Zero(module, stage=3, optimizer=torch.optim.AdamW, lr=1e-3)
            optimizer: Any = model.optimizer
        else:
            if kind == "tensor_parallel":
                pypar.tensor_parallel(module)
                model = module
            else:
                model = pypar.DataParallel(module) if kind == "DataParallel" else pypar.Pipeline(module)
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        pypar.load(f"{folder}/plain", model, optimizer)
        pypar.save(f"{folder}/{kind}", model, optimizer)
        back, back_optimizer = _plain()
        pypar.load(f"{folder}/{kind}", back, back_optimizer)
        found.append((kind, _differences(_tensors(back, back_optimizer), wanted)))
    return found


def _plain() -> tuple[nn.Module, torch.optim.Optimizer]:
    model = make_model("own", layers=2, tied=True)
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    return model, torch.optim.AdamW(model.parameters(), lr=1e-3)


def _tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    names = {p: n for n, p in model.named_parameters()}
    states = {f"{names[p]} {k}": v for p, each in optimizer.state.items() for k, v in each.items()}
    return {**model.state_dict(), **states}


def test_plain_modules_and_each_method_by_itself(tmp_path: Path):
    model, optimizer = _plain()
    model(make_batches(1, 2)[0]["input_ids"]).sum().backward()
    optimizer.step()
    wanted = {name: value.clone() for name, value in _tensors(model, optimizer).items()}
    pypar.save(tmp_path / "plain", model, optimizer, extra=[1, "two"])
    other, other_optimizer = _plain()
    assert pypar.load(tmp_path / "plain", other, other_optimizer) == [1, "two"]
    assert not _differences(_tensors(other, other_optimizer), wanted)
    assert run_ranks(_alone, 2, str(tmp_path))[0] == [
        (kind, []) for kind in ("DataParallel", "Zero", "Pipeline", "tensor_parallel")
    ]


def test_states_of_other_optimizers_and_buffers_are_kept(tmp_path: Path):
    kinds = [(torch.optim.SGD, {"momentum": 0.9}), (torch.optim.NAdam, {}), (torch.optim.Adafactor, {})]
    for kind, settings in kinds:

        def make(kind: Any = kind, settings: Any = settings) -> tuple[nn.Module, torch.optim.Optimizer]:
            model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6))
            model.register_parameter("scale", nn.Parameter(torch.randn(())))
            groups = [
                {"params": [*model[0].parameters()], "lr": 0.1},
                {"params": [*model[1].parameters(), model.scale]},
            ]
            return model, kind(groups, lr=0.2, **settings)

        model, optimizer = make()
        for _ in range(2):
            (model(torch.randn(5, 4)).sum() * model.scale).backward()
            optimizer.step()
        pypar.save(tmp_path / kind.__name__, model, optimizer)
        other, other_optimizer = make()
        pypar.load(tmp_path / kind.__name__, other, other_optimizer)
        assert not _differences(_tensors(other, other_optimizer), _tensors(model, optimizer)), kind
        assert [g["lr"] for g in other_optimizer.param_groups] == [0.1, 0.2]
