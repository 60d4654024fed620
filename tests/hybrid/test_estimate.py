"""pypar.estimate and the command `pypar estimate`: what they take, refuse and show."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hybrid.hybrid_common import make_model
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import pypar
from pypar.cli import main
from pypar.hybrid import Traffic
from pypar.hybrid.dry import stand_in

OWN = """
import torch
from torch import nn

def make_model():
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))

def make_batch(batch_size, seq_len):
    return torch.zeros(batch_size, 8), torch.zeros(batch_size, 4)

def loss_fn(output, targets):
    return (output - targets).square().mean()

class Narrow(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(7, 4)

    def forward(self, x):
        return self.inner(x)

def narrow():
    return Narrow()

def not_a_model():
    return 3

def fails():
    raise RuntimeError("no such thing")
"""


def on_meta(kind: str, **options) -> nn.Module:
    with torch.device("meta"):
        return make_model(kind, **options)


@pytest.mark.parametrize("plan", ["dp=2 zero=3 recompute=true", "pp=2 tp=2 micro_batches=2 schedule=zbv"])
def test_the_module_needs_no_values_and_stays_as_it_is(plan):
    model = make_model("llama", tied=True, dropout=0.1)
    weights = {name: (tensor, tensor.clone()) for name, tensor in model.state_dict(keep_vars=True).items()}
    kinds = {name: (type(m), m.training, len(m._forward_hooks)) for name, m in model.named_modules()}
    state = torch.default_generator.get_state()
    found = pypar.estimate(model, plan, (4, 12))
    assert torch.equal(torch.default_generator.get_state(), state)
    assert {n: (type(m), m.training, len(m._forward_hooks)) for n, m in model.named_modules()} == kinds
    for name, tensor in model.state_dict(keep_vars=True).items():
        assert tensor is weights[name][0] and torch.equal(tensor, weights[name][1]) and tensor.grad is None
    assert pypar.estimate(on_meta("llama", tied=True, dropout=0.1), plan, (4, 12)) == found


def test_what_each_method_saves():
    model = on_meta("own", layers=8)
    size = sum(p.nbytes for p in model.parameters())
    alone = pypar.estimate(model, "dp=1", (8, 12)).ranks[0]
    assert alone.memory["parameters"] == size and alone.settled["gradients"] == size
    assert alone.memory["optimizer"] == pytest.approx(2 * size, rel=0.01) and alone.sent_bytes == 0
    shared = pypar.estimate(model, "dp=4 zero=3", (8, 12)).ranks[0]
    assert shared.memory["optimizer"] < 0.6 * size and shared.host_parameters >= size
    cut = pypar.estimate(model, "tp=2", (8, 12)).ranks[1]
    assert cut.memory["parameters"] < 0.6 * size
    again = pypar.estimate(model, "dp=1 recompute=true", (8, 12)).ranks[0]
    assert again.memory["activations"] < 0.5 * alone.memory["activations"]
    stages = pypar.estimate(model, "pp=4 micro_batches=8", (8, 12)).ranks
    assert sum(rank.memory["parameters"] for rank in stages) == size
    assert stages[0].memory["activations"] > stages[3].memory["activations"]  # 1f1b holds most in the first stage


def test_optimizers():
    model = on_meta("own")
    size = sum(p.nbytes for p in model.parameters())
    assert pypar.estimate(model, "dp=1", (2, 12), optimizer=torch.optim.SGD).ranks[0].memory["optimizer"] == 0
    with_momentum = pypar.estimate(model, "dp=1", (2, 12), optimizer=torch.optim.SGD, lr=0.1, momentum=0.9)
    assert with_momentum.ranks[0].memory["optimizer"] == size


def test_order_of_the_axes():
    found = pypar.estimate(on_meta("own"), "pp=2 dp=2 tp=2 order=tp+dp+pp micro_batches=2", (4, 12))
    assert [(r.tp_rank, r.dp_rank, r.pp_rank) for r in found.ranks][:4] == [(0, 0, 0), (0, 0, 1), (0, 1, 0), (0, 1, 1)]


def test_bytes_of_calls():
    x = torch.empty(12, 8, dtype=torch.float64)
    with stand_in(1, 4) as group, FakeTensorMode(allow_non_fake_inputs=True), Traffic() as traffic:
        name = group.group_name
        torch.ops.pypar.all_reduce(x, "sum", name)
        torch.ops.pypar.all_gather(x, name, [1, 12, 3, 4])
        torch.ops.pypar.reduce_scatter(x, "sum", name)
        torch.ops.pypar.broadcast(x, 0, name)
        torch.ops.pypar.broadcast(x, 1, name)
        torch.ops.pypar.matmul_all_reduce([x], [torch.empty(5, 8, dtype=x.dtype)], None, None, name)
        torch.ops.pypar.matmul_reduce_scatter([x], [torch.empty(5, 8, dtype=x.dtype)], None, None, [3, 4, 4, 1], name)
        torch.ops.pypar.all_gather_matmul(x, [torch.empty(5, 8, dtype=x.dtype)], [None], [1, 12, 3, 4], name)
    n, product = 12 * 8 * 8, 12 * 5 * 8
    assert traffic.by_axis({name: "tp"}) == {
        ("tp", "all_reduce"): 3 * n // 2,
        ("tp", "all_gather"): 3 * n,
        ("tp", "reduce_scatter"): 3 * n // 4,
        ("tp", "broadcast"): 3 * n,
        ("tp", "matmul_all_reduce"): 3 * product // 2,
        ("tp", "matmul_reduce_scatter"): product - 4 * 5 * 8,
        ("tp", "all_gather_matmul"): 3 * n,
    }


def test_wrong_input():
    model = on_meta("own")
    with pytest.raises(pypar.PlanError, match="has 4 heads, too few for 8 ranks"):
        pypar.estimate(model, "tp=8", (8, 12))
    with pytest.raises(ValueError, match="a batch of 2 samples for dp=4"):
        pypar.estimate(model, "dp=4", (2, 12))
    with pytest.raises(ValueError, match="samples and tokens, both 1 or more"):
        pypar.estimate(model, "dp=1", (0, 12))
    with pytest.raises(ValueError, match="looks at the values of a tensor"):
        pypar.estimate(model, "dp=1", (2, 12), loss_fn=lambda output, batch: output.sum() * output.max().item())
    with pytest.raises(ValueError, match="loss_fn returned str"):
        pypar.estimate(model, "dp=1", (2, 12), loss_fn=lambda output, batch: "0.3")


def test_command(tmp_path: Path, capsys):
    chart = tmp_path / "estimate.svg"
    line = ["estimate", "--model", "llama-tiny", "--batch-size", "4", "--seq-len", "16", "--plan", "pp=2 zero=2 dp=2"]
    assert main([*line, "--chart", str(chart)]) == 0
    out = capsys.readouterr().out
    assert "2.3 million parameters; plan pp=2 dp=2 zero=2" in out and out.count("\n") >= 9
    assert "<svg" in chart.read_text()
    assert main([*line, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert [(r["pp"], r["dp"], r["tp"]) for r in said["ranks"]] == [(0, 0, 0), (0, 1, 0), (1, 0, 0), (1, 1, 0)]
    assert set(said["ranks"][0]["memory"]) == {"parameters", "gradients", "optimizer", "activations", "buffers"}
    assert said["ranks"][0]["sent"]["pp"]["ring"] > 0


def test_command_with_an_own_model(tmp_path: Path, capsys):
    file, plan = tmp_path / "own_model.py", tmp_path / "plan.json"
    file.write_text(OWN)
    plan.write_text(pypar.Plan(dp=2, zero=1).to_json())
    line = ["estimate", "--model", f"{file}:make_model", "--plan", str(plan), "--json"]
    assert main([*line, "--batch-size", "6", "--optimizer", "SGD"]) == 0
    ranks = json.loads(capsys.readouterr().out)["ranks"]
    assert [r["memory"]["optimizer"] for r in ranks] == [0, 0] and ranks[0]["sent"]["dp"]["zero_scatter"] > 0


@pytest.mark.parametrize(
    "line, message",
    [
        ("--model llama-smal", "did you mean llama-small?"),
        ("--model llama-tiny --plan zoro=1", "there is no such field"),
        ("--model llama-tiny --plan tp=16", "use tp = 1 to 4"),
        ("--model llama-tiny --plan nowhere.json", "No such file"),
        ("--model llama-tiny --batch-size 0", "'0' is no number of 1 or more"),
        ("--model llama-tiny --batch-size 2 --plan dp=4", "a batch of 2 samples for dp=4"),
        ("--model llama-tiny --chart estimate.jpg", "ends in .png, .svg or .pdf"),
        ("--model OWN", "name the function that makes the model"),
        ("--model OWN:nothing", "has no function 'nothing'"),
        ("--model OWN:not_a_model", "returned int; expected an nn.Module"),
        ("--model OWN:narrow", "fails in a step under --plan dp=1, as it would in a run: RuntimeError: "),
        ("--model OWN:fails", "fails: it raised RuntimeError: no such thing"),
        ("--model nowhere.py:make_model", "there is no file nowhere.py"),
        ("--plan dp=2", "the following arguments are required: --model"),
    ],
)
def test_command_with_wrong_input(line, message, tmp_path: Path, capsys):
    file = tmp_path / "own_model.py"
    file.write_text(OWN)
    assert main(["estimate", *line.replace("OWN", str(file)).split()]) == 2
    err = capsys.readouterr().err
    assert err.startswith("pypar estimate: error: ") and message in err and err.count("\n") == 1
