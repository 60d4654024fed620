"""bench_train_tp: rows, tables, charts of a tiny model; no number for what computes something else; the breakdown."""

from __future__ import annotations

import csv
import shutil
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from bench import bench_train_tp, breakdown, harness
from bench.alone import cut_alone
from bench.bench_train_tp import BENCH
from bench.breakdown import CATEGORIES, Exchange, StepProfile
from bench.harness import Result
from bench.models import CONFIGS, GPT, GPTConfig
from bench.step_bench import column
from bench.steps import Built, case_of
from bench.tensor_training import WAYS, TensorRank, Way, tokens_per_step
from pypar.testing import run_ranks

needs_compiler = pytest.mark.skipif(
    shutil.which("cc") is None, reason="no C compiler, which the barrier of the bench needs"
)
EXTRA = [*map(column, CATEGORIES), "efficiency", "tokens_per_s"]


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


class Wrong(TensorRank):
    """Plants what is wrong: tp-pypar doesn't sum the gradient of one input, none-sp has a layer that isn't cut, and
    dtensor-gloo forgets a gradient once its steps are timed."""

    def build(self, way: Way, config: GPTConfig) -> Built:
        built = super().build(way, config)
        if way == WAYS["tp-pypar"]:
            gate: Any = built.module.blocks[0].mlp.gate
            gate.shared_input = lambda x: x
        if way == WAYS["none-sp"]:
            built.module.head.weight = nn.Parameter(torch.randn(config.vocab_size, config.width))
        return built

    def measure(self, variant: str, case: harness.Case, iters: int, num_samples: int) -> list[float]:
        if variant == "dtensor-gloo":
            self.of(variant, case).module.norm.weight.requires_grad_(False)
        return super().measure(variant, case, iters, num_samples)


@needs_compiler
def test_wrong_variants_have_no_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ways = {name: WAYS[name] for name in ("none", "none-sp", "tp-pypar", "dtensor-gloo")}
    case, results = BENCH.run_model("tiny", ways, steps=2, kind=Wrong, say=lambda line: None)
    refused = {r.variant: r.refused for r in results if r.refused}
    assert set(refused) == {"none-sp", "tp-pypar", "dtensor-gloo"}
    assert "such shares aren't" in refused["none-sp"]
    assert "the gradient of embedding.weight is off by" in refused["tp-pypar"]
    assert "norm.weight has no gradient" in refused["dtensor-gloo"]

    assert not BENCH.publish(results, case, ways, tmp_path)
    assert {row["variant"] for row in read(tmp_path / "bench_train_tp.csv")} == {"none"}
    assert capsys.readouterr().out.count("REFUSED") == 3


def check_baseline(rank: int, world_size: int) -> None:
    for sequence in (False, True):
        model = GPT(CONFIGS["tiny"])
        cut_alone(model, 1, 2, dist.group.WORLD, sequence)
        tokens = torch.randint(256, (2, 33))
        model(tokens[:, :-1], tokens[:, 1:]).backward()
        attention, mlp = model.blocks[1].attention, model.blocks[1].mlp
        assert attention.q.weight.grad.shape == attention.o.weight.grad.t().shape == (32, 64)
        assert mlp.up.weight.grad.shape == mlp.down.weight.grad.t().shape == (88, 64)
        assert model.embedding.weight.grad.shape == model.head.weight.grad.shape == (128, 64)


def test_baseline_needs_no_other_rank() -> None:
    run_ranks(check_baseline, 1)  # rank 1 of 2, and no rank 0


@needs_compiler
def test_quick_run_writes_rows_and_charts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    variants = ["dtensor-gloo", "dtensor-sp-pypar", "tp-pypar", "tp-sp-pypar"]
    assert bench_train_tp.main(["--quick", "--variants", *variants, "--results", str(tmp_path)]) == 0
    rows = read(tmp_path / "bench_train_tp.csv")
    assert {row["variant"] for row in rows} == {"none", "none-sp", *variants}
    assert list(rows[0]) == [*harness.COLUMNS, *EXTRA]
    for row in rows:
        assert (row["op"], row["verified"], row["ranks"]) == ("train_tiny", "True", "2")
        base = "none-sp" if "sp" in row["variant"] else "none"
        none = next(r for r in rows if r["variant"] == base and r["regime"] == row["regime"])
        assert float(row["efficiency"]) == pytest.approx(float(none["median_us"]) / float(row["median_us"]), abs=1e-4)
        parts = {name: float(row[column(name)]) for name in CATEGORIES}
        assert min(parts.values()) >= 0 and parts["matmul"] > 0 and parts["optimizer"] > 0
        assert parts["communication"] > 0 or row["variant"].startswith("none")
    out = capsys.readouterr().out
    assert "efficiency" in out and "where the time goes" in out
    for name in ("bench_train_tp_tiny.png", "bench_train_tp_tiny_breakdown.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_efficiency_is_against_the_own_baseline() -> None:
    case = case_of("small", 2)
    ms = {"none": 96.0, "none-sp": 90.0, "tp-pypar": 100.0, "tp-sp-pypar": 100.0, "dtensor-gloo": 100.0}
    ways = bench_train_tp.ways_of(list(ms))
    results = [Result(case, name, "fast", [1e3 * value], line_ns=[(50, 50)]) for name, value in ms.items()]
    ratios = {ratio.name: ratio for ratio in BENCH.efficiency(results, case, ways)}
    percents = {name: ratio.value(case.nbytes) for name, ratio in ratios.items()}
    assert percents == {"none": 100, "none-sp": 100, "tp-pypar": 96, "tp-sp-pypar": 90, "dtensor-gloo": 96}
    verdicts = {name: ratio.verdict(case.nbytes) for name, ratio in ratios.items()}
    assert verdicts == {"none": "", "none-sp": "", "tp-pypar": "PASS", "tp-sp-pypar": "MISS", "dtensor-gloo": ""}
    assert list(bench_train_tp.ways_of(["tp-sp-pypar"])) == ["none-sp", "tp-sp-pypar"]
    assert tokens_per_step(case) == 4 * 256


def event(name: str, start: float, end: float, *children: Any, parent: bool = False) -> Any:
    own = end - start - sum(c.time_range.end - c.time_range.start for c in children)
    for child in children:
        child.cpu_parent = True
    span = SimpleNamespace(start=start, end=end)
    return SimpleNamespace(
        name=name, time_range=span, cpu_children=children, self_cpu_time_total=own, thread=1, cpu_parent=None
    )


def test_own_time_goes_to_one_category(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(breakdown, "_event_cost_us", lambda: 0.5)
    roots = [
        event("aten::linear", 0, 10, event("aten::mm", 1, 9)),
        event("pypar::matmul_all_reduce", 10, 30, event("aten::mm", 11, 20)),
        event("aten::mul", 30, 50, event("aten::mul", 40, 43)),  # a DTensor's, with the shard's inside
        event("aten::_scaled_dot_product_flash_attention_for_cpu_backward", 50, 54),
        event("Optimizer.step#AdamW.step", 54, 60, event("aten::_fused_adamw_", 55, 59), event("aten::mm", 59, 60)),
    ]
    other_thread = event("gloo:all_reduce", 0, 60)
    other_thread.thread = 2
    kineto = SimpleNamespace(kineto_results=SimpleNamespace(trace_start_ns=lambda: 7_000_000))
    got = breakdown._profile_of(SimpleNamespace(profiler=kineto, events=lambda: [*roots, other_thread]), 80.0)
    assert got.categories == {"matmul": 17, "communication": 11, "other compute": 3, "attention": 4, "optimizer": 5}
    assert got.num_events == 10
    assert got.exchanges == [Exchange(7020.0, 11.0, "communication")]  # it came when its matmul was done


def test_waiting_is_what_an_exchange_took_before_the_last_rank_came() -> None:
    early = StepProfile(100, 10, 0.5, Counter({"communication": 30, "matmul": 50}))
    late = StepProfile(100, 10, 0.5, Counter({"communication": 10, "matmul": 60}))
    early.exchanges = [Exchange(1000, 25, "communication"), Exchange(1030, 5, "communication")]
    late.exchanges = [Exchange(1020, 5, "communication"), Exchange(1050, 5, "communication")]
    parts = breakdown.merge([early, late])
    assert parts["waiting"] == (20 + 5) / 2  # never more than the exchange took
    assert parts["communication"] == (30 - 25 + 10) / 2
    assert parts["python"] == (100 - 80 - 5 + 100 - 70 - 5) / 2
    late.exchanges.pop()
    with pytest.raises(ValueError, match="exchanges"):
        breakdown.merge([early, late])
    slow = StepProfile(200)
    assert breakdown.least_disturbed([[slow, early], [early, late]]) == [early, late]


def test_profile_of_a_step() -> None:
    x = torch.randn(256, 256, requires_grad=True)
    (profile,) = breakdown.profile(lambda: (x @ x).tanh().sum().backward(), lambda: None, 1)
    assert profile.ops["aten::mm"] == profile.categories["matmul"] > 0
    assert profile.ops["aten::tanh"] > 0 and profile.num_events > 5
    assert sum(profile.categories.values()) < profile.wall_us
