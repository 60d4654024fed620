"""pypar.verify: what agrees, and faults that are planted, found and located."""

from __future__ import annotations

import json
import types
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hybrid.hybrid_common import make_batches, make_model
from torch import nn

import pypar
from pypar.cli import main
from pypar.hybrid import PlanError
from pypar.testing import run_ranks
from pypar.verify.steps import Settings, alone

UP = "blocks.2.mlp.up_proj.weight"


def own() -> nn.Module:
    return make_model("own")


def tied() -> nn.Module:
    return make_model("own", tied=True)


def llama() -> nn.Module:
    return make_model("llama")


def with_dropout() -> nn.Module:
    return make_model("own", dropout=0.2)


def gpt2_with_dropout() -> nn.Module:
    return make_model("gpt2", dropout=0.2)


def another_each_time() -> nn.Module:
    torch.seed()
    return nn.Linear(4, 4)


def no_reduction(model: Any, _optimizer: Any) -> None:
    """The gradient of one weight stays this rank's own."""
    reducer = model._data._reducer
    slot = next(s for s in reducer.slots if s.name == UP)
    launch, wait, kept = reducer.launch, reducer.wait, []

    def launches(bucket: Any) -> None:
        if slot.bucket is bucket:
            kept[:] = [slot.view.clone()]
        launch(bucket)

    def waits(bucket: Any) -> None:
        wait(bucket)
        if slot.bucket is bucket and kept:
            slot.view.copy_(kept[0])

    reducer.launch, reducer.wait = launches, waits


def wrong_shard(model: Any, _optimizer: Any) -> None:
    """Each rank of tensor parallel holds the other one's columns of one weight."""
    weight = model.module.get_parameter(UP).detach()
    both = [torch.empty_like(weight) for _ in range(2)]
    dist.all_gather(both, weight, group=model.axes.tp_group)
    weight.copy_(both[1 - model.axes.tp_rank])


def counted_twice(model: Any, _optimizer: Any) -> None:
    """The gradient of a weight that two stages share."""
    gradients = model.pipeline._tied_gradients
    end = gradients.end

    def ends() -> None:
        end()
        for each in gradients.tied:
            if each.parameter is not None:
                each.parameter.grad.mul_(2)

    gradients.end = ends


def weighted_by_rank(model: Any, _optimizer: Any) -> None:
    """A share's tokens count by its own number of them."""
    begin = model._begin

    def begins(batch: Any, loss_fn: Any) -> Any:
        parts, losses, seed = begin(batch, loss_fn)
        losses.total = float((batch["labels"][:, 1:] != -100).sum()) * model.axes.dp
        return parts, losses, seed

    model._begin = begins


def skips_a_block(model: Any, _optimizer: Any) -> None:
    part = next(p for p in model.pipeline.cut.parts if p.name == "blocks.2")
    forward = part.module.forward

    def skips(self: Any, x: torch.Tensor, *args: Any) -> Any:
        out = forward(x, *args)
        return x if model.pipeline._stages.now.stage == part.stage else out

    part.module.forward = types.MethodType(skips, part.module)


@pytest.mark.parametrize("plan", ["pp=2 dp=2 zero=2 schedule=zbh1 micro_batches=2", "dp=2 tp=2 zero=3 micro_batches=2"])
def test_a_right_model_agrees(plan: str):
    report = pypar.verify(llama, plan, make_batches(1, 7)[0], clip=1.0, accumulate=2, freeze=["layers.1.mlp"])
    assert report.ok and report.first == "", report.table()
    gradients = {row.name for row in report.rows if row.what == "gradient"}
    assert "lm_head.weight" in gradients and "model.layers.1.mlp.up_proj.weight" not in gradients
    assert "all as in one process" in report.table()
    assert json.loads(report.to_json())["ok"] is True


@pytest.mark.parametrize(
    ("make", "plan"),
    [
        (with_dropout, "dp=2 micro_batches=2 zero=1"),
        (with_dropout, "tp=2 micro_batches=2 sequence_parallel=true"),
        (with_dropout, "pp=2 micro_batches=3 schedule=zbv"),
        (gpt2_with_dropout, "pp=2 dp=2 micro_batches=2"),
        (gpt2_with_dropout, "dp=2 tp=2"),
    ],
)
def test_dropout_is_held_against_the_same_numbers(make: Any, plan: str):
    report = pypar.verify(make, plan, make_batches(1, 7)[0])
    assert report.ok, report.table()
    without = alone(make_model("own" if make is with_dropout else "gpt2"), make_batches(1, 7), Settings())
    assert abs(without.losses[0] - report.losses[0][1]) > 1e-4, "nothing was dropped out"


@pytest.mark.parametrize(
    ("make", "plan", "fault", "first", "says"),
    [
        (own, "dp=2", no_reduction, f"the gradient of {UP}", [f"gradient of {UP} is not the same on ranks 0 and 1"]),
        (own, "dp=2 tp=2", wrong_shard, "the output of blocks.2", [f"gradient of {UP} in step 1", "tp 0/2"]),
        (
            tied,
            "pp=2 micro_batches=2",
            counted_twice,
            "the gradient of lm_head.weight",
            ["embed.weight", "rank 0 (pp 0/2"],
        ),
        (own, "dp=2", weighted_by_rank, "the gradient of lm_head.weight", ["rank 0 (pp 0/1 dp 0/2"]),
        (own, "pp=2 micro_batches=2", skips_a_block, "the output of blocks.2", ["rank 1 (pp 1/2"]),
    ],
)
def test_a_planted_fault_is_found_and_located(make: Any, plan: str, fault: Any, first: str, says: list[str]):
    report = pypar.verify(make, plan, make_batches(1, 8)[0], tamper=fault)
    text = report.table()
    assert not report.ok
    assert report.first == first, text
    assert f"look first at {first}" in text
    for each in says:
        assert each in text, text


def _here(rank: int, world: int) -> tuple[bool, int]:
    report = pypar.verify(own, "dp=2", make_batches(1, 8)[0])
    return report.ok, len(report.rows)


def test_within_a_job_its_ranks_are_used():
    first, second = run_ranks(_here, 2)
    assert first == second and first[0] and first[1] > 100


def test_what_can_not_be_compared():
    with pytest.raises(ValueError, match="another one each time that it is made"):
        pypar.verify(another_each_time, "dp=2", make_batches(1, 8)[0])
    with pytest.raises(PlanError, match="8 stages for 4 blocks"):
        pypar.verify(own, "pp=8 micro_batches=8", make_batches(1, 8)[0])


MINE = """
import torch
from torch import nn

def make_model():
    return nn.Sequential(*(nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 6)) for _ in range(4)))

def make_batch(batch_size, seq_len):
    x = torch.randn(batch_size, 6)
    return x, torch.sin(x)

def loss_fn(output, targets):
    return ((output - targets) ** 2).sum(), targets.numel()
"""


def test_the_command_on_a_file_of_mine(tmp_path, capfd):
    file = tmp_path / "mine.py"
    file.write_text(MINE)
    plan = tmp_path / "plan.json"
    plan.write_text(pypar.Plan(pp=2, dp=2, zero=1, micro_batches=2).to_json())
    assert main(["verify", "--model", f"{file}:make_model", "--plan", str(plan), "--batch-size", "7"]) == 0
    out = capfd.readouterr().out
    assert "one process, step 3: loss" in out
    assert "3.2.weight" in out and "all as in one process" in out
    command = ["verify", "--model", f"{file}:make_model", "--plan", "tp=2", "--float64", "--json", "--steps", "1"]
    assert main(command) == 0
    assert json.loads(capfd.readouterr().out)["rtol"] == 1e-10
    command = ["verify", "--model", f"{file}:make_model", "--plan", "dp=2", "--rtol", "0", "--atol", "0", "--json"]
    assert main(command) == 1
    report = json.loads(capfd.readouterr().out)
    assert report["ok"] is False and report["first"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--model", "llama-tiny"], "--plan"),
        (["--model", "llama-tiny", "--plan", "zero=4"], "zero=4: there are 0"),
        (["--model", "nothing.py:f", "--plan", "dp=2"], "there is no file nothing.py"),
        (["--model", "lama-tiny", "--plan", "dp=2"], "did you mean llama-tiny"),
        (["--model", "llama-tiny", "--plan", "dp=2", "--steps", "0"], "'0' is no number of 1 or more"),
        (["--model", "llama-tiny", "--plan", "pp=16 micro_batches=16"], "16 stages for"),
    ],
)
def test_wrong_input_is_named(arguments: list[str], says: str, capfd):
    assert main(["verify", *arguments]) == 2
    error = capfd.readouterr().err
    assert error.startswith("pypar verify: error: ") and says in error, error
