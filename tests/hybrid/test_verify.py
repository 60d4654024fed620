"""pypar.verify: what agrees, and faults that are planted, found and located."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
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
from pypar.verify.report import compare
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


class Hidden(nn.Module):
    """Draws random numbers that no attribute tells of."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.dropout(self.linear(x), 0.3, self.training)


def with_everything() -> tuple[nn.Module, Any, Any]:
    x = torch.randn(7, 6)
    model = nn.Sequential(*(Hidden() for _ in range(4)))
    return model, (x, torch.sin(x)), lambda output, targets: (((output - targets) ** 2).sum(), targets.numel())


def another_each_time() -> nn.Module:
    torch.seed()
    return nn.Linear(4, 4)


def another_buffer_each_time() -> nn.Module:
    model = nn.Linear(4, 4)
    model.register_buffer("offset", torch.tensor(float(torch.seed() % 1000)))
    return model


def not_a_model() -> int:
    return 3


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


def momentum_not_kept(_model: Any, optimizer: Any) -> None:
    """After the last step one weight's momentum is another; the weights are right."""
    inner = getattr(optimizer, "inner", optimizer)
    index = [name for name, _ in _model.module.named_parameters()].index(UP)
    parameter = [p for group in inner.param_groups for p in group["params"]][index]
    step, steps = inner.step, []

    def counted(*args: Any, **kwargs: Any) -> Any:
        result = step(*args, **kwargs)
        steps.append(result)
        if len(steps) == 3 and dist.get_rank() == 0:
            inner.state[parameter]["momentum_buffer"].mul_(1.1)
        return result

    inner.step = counted


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


def test_every_state_of_the_optimizer_is_compared():
    options = {"lr": 1e-2, "momentum": 0.9}
    sgd: dict[str, Any] = {"optimizer": torch.optim.SGD, "options": options}
    assert pypar.verify(own, "dp=2 zero=1", make_batches(1, 8)[0], **sgd).ok
    report = pypar.verify(own, "dp=2", make_batches(1, 8)[0], **sgd, tamper=momentum_not_kept)
    assert [row.title for row in report.rows if not row.ok] == [f"momentum_buffer of {UP}"], report.table()
    assert report.first == f"the momentum_buffer of {UP}"
    assert "held by rank 0 (pp 0/1 dp 0/2" in report.table()


def test_a_small_state_counts_and_a_nan_is_json():
    """Squares of gradients are far below the absolute tolerance."""
    wanted = alone(make_model("own"), make_batches(3, 7), Settings())
    assert compare("", wanted, wanted, 1e-5, 1e-6).ok
    squares = {n: {k: v * (2 if k == "exp_avg_sq" else 1) for k, v in s.items()} for n, s in wanted.states.items()}
    report = compare("", dataclasses.replace(wanted, states=squares), wanted, 1e-5, 1e-6)
    wrong = {row.name for row in report.rows if not row.ok}
    assert {row.key for row in report.rows if not row.ok} == {"exp_avg_sq"} and UP in wrong
    less = {n: {k: v for k, v in s.items() if k != "exp_avg_sq"} for n, s in wanted.states.items()}
    report = compare("", dataclasses.replace(wanted, states=less), wanted, 1e-5, 1e-6)
    assert "exp_avg_sq of embed.weight: nothing, one process [97, 24]" in report.table()
    nan = dataclasses.replace(wanted, losses=[float("nan"), *wanted.losses[1:]])
    report = compare("", nan, wanted, 1e-5, 1e-6)
    assert not report.ok and json.loads(report.to_json())["losses"][0][1] == "nan"
    assert not compare("", type(wanted)(), type(wanted)(), 1e-5, 1e-6).ok, "nothing was run"


def test_batch_and_loss_come_with_the_model_and_hidden_dropout_is_seen():
    said: list[str] = []
    report = pypar.verify(with_everything, "pp=2 micro_batches=2", say=said.append)
    assert report.ok, report.table()
    assert "the model draws random numbers: one process draws those of the plan" in said


def test_a_rate_for_every_dropout():
    batch = make_batches(1, 7)[0]
    report = pypar.verify(own, "dp=2", batch, dropout=0.2)
    assert report.ok, report.table()
    assert abs(pypar.verify(own, "dp=2", batch).losses[0][1] - report.losses[0][1]) > 1e-4
    with pytest.raises(ValueError, match="no dropout to set"):
        pypar.verify(another_each_time, "dp=2", batch, dropout=0.2)
    with pytest.raises(ValueError, match=r"1\.5 is not in"):
        pypar.verify(own, "dp=2", batch, dropout=1.5)


def _here(rank: int, world: int) -> tuple[bool, int]:
    report = pypar.verify(own, "dp=2", make_batches(1, 8)[0])
    return report.ok, len(report.rows)


def test_within_a_job_its_ranks_are_used():
    first, second = run_ranks(_here, 2)
    assert first == second and first[0] and first[1] > 100


def _here_with_dropout(rank: int, world: int) -> list[str]:
    said = []
    for make in (with_dropout, with_everything):
        with pytest.raises(ValueError, match="needs a reference of its own") as error:
            pypar.verify(make, "dp=2", make_batches(1, 8)[0] if make is with_dropout else None)
        said.append(str(error.value))
    return said


def test_dropout_within_a_job_is_refused_on_every_rank():
    assert len(run_ranks(_here_with_dropout, 2)) == 2


@pytest.mark.parametrize(
    ("make", "given", "says"),
    [
        (another_each_time, {}, r"another one each time that it is made \(weight\)"),
        (another_buffer_each_time, {}, r"another one each time that it is made \(offset\)"),
        (not_a_model, {}, "not_a_model: it returned int; expected an nn.Module"),
        (lambda: own(), {}, "model_fn can't be sent to the ranks"),
        (own, {"loss_fn": lambda output, batch: output.sum()}, "loss_fn can't be sent to the ranks"),
        (own, {"freeze": ["atention"]}, "no parameter has 'atention' in its name"),
        (own, {"freeze": ["weight", "bias"]}, "no parameter that is trained: freeze less"),
        (own, {"batch": []}, "a list of 0 batches, but 3 steps of 1 need 3"),
        (own, {"batch": make_batches(4, 8), "accumulate": 3}, "a list of 4 batches, but 3 steps of 3 need 9"),
        (own, {"steps": 0}, "steps=0, accumulate=1: 1 or more each"),
        (own, {"batch": None}, "no batch: give one"),
    ],
)
def test_what_can_not_be_compared(make: Any, given: dict[str, Any], says: str):
    with pytest.raises(ValueError, match=says):
        pypar.verify(make, "dp=2", **{"batch": make_batches(1, 8)[0], **given})


def test_an_illegal_plan():
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

def with_batch():
    x = torch.randn(7, 6)
    return make_model(), (x, torch.cos(x)), lambda output, targets: ((output - targets) ** 2).mean()

def too_wide():
    return nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 5))
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
    command = ["verify", "--model", f"{file}:with_batch", "--plan", "dp=2 zero=2", "--steps", "2", "--freeze", "1.0"]
    assert main(command) == 0
    assert "all as in one process" in capfd.readouterr().out
    for function, more, says in (
        ("too_wide", [], "RuntimeError: mat1 and mat2 shapes cannot be multiplied"),
        ("nothing", [], "has no function 'nothing'"),
        ("make_model", ["--dropout", "0.1"], "no dropout to set"),
        ("make_model", ["--freeze", "typo"], "no parameter has 'typo' in its name"),
    ):
        assert main(["verify", "--model", f"{file}:{function}", "--plan", "dp=2", *more]) == 2
        error = capfd.readouterr().err
        assert error.startswith("pypar verify: error: ") and says in error, error


def test_the_command_under_torchrun_uses_its_ranks(tmp_path):
    """One report, of the job's ranks, not one of each."""
    file = tmp_path / "mine.py"
    file.write_text(MINE)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "pypar"]
    command = [*launch, "verify", "--model", f"{file}:make_model", "--plan", "dp=2", "--steps", "1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("all as in one process") == 1
    assert done.stdout.count("2 ranks, step 1: loss") == 1


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
