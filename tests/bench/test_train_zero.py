"""bench_train_zero: rows, tables, charts of a tiny model; no number for what computes or steps something else."""

from __future__ import annotations

import csv
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import bench_train_zero, harness, zero_ops
from bench.bench_train_zero import BENCH, ways_of
from bench.breakdown import CATEGORIES, category
from bench.harness import Case, Result
from bench.models import CONFIGS, GPT, GPTConfig
from bench.step_bench import column
from bench.steps import Built, case_of
from bench.zero_training import SETTINGS, WAYS, ShareOfAdamW, ZeroTrainRank, first_step_wrong

needs_compiler = pytest.mark.skipif(
    shutil.which("cc") is None, reason="no C compiler, which the barrier of the bench needs"
)


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


class Wrong(ZeroTrainRank):
    """Plants what is wrong: none steps everything, zero-2 steps with another eps, ddp-gloo doesn't reduce, and zero-1
    forgets a gradient once its steps are timed."""

    def build(self, way: Any, config: GPTConfig) -> Built:
        built = super().build(way, config)
        if way == WAYS["none"]:
            built.optimizer.percent = 100.0  # type: ignore[attr-defined]
        if way == WAYS["zero-2"]:
            built.optimizer.param_groups[0]["eps"] = 1e-3
        if way == WAYS["ddp-gloo"]:
            built.module.require_backward_grad_sync = False
        return built

    def measure(self, variant: str, case: Case, iters: int, num_samples: int) -> list[float]:
        if variant == "zero-1":
            self.of(variant, case).module.full_gradients = dict  # type: ignore[assignment]
        return super().measure(variant, case, iters, num_samples)


class Unprofiled(ZeroTrainRank):
    """Ends when it is asked where the time goes."""

    def profile(self, variant: str, case: Case, num_steps: int) -> Any:
        raise RuntimeError("no memory for a profile")


@needs_compiler
def test_a_breakdown_that_fails_costs_no_times() -> None:
    said: list[str] = []
    _, results = BENCH.run_model("tiny", {"none": WAYS["none"]}, steps=2, kind=Unprofiled, say=said.append)
    assert [r.variant for r in results if r.us and not r.refused][:1] == ["none"]
    assert said[-1].startswith("  no breakdown of none: rank ") and said[-1].endswith("no memory for a profile"), said


@needs_compiler
def test_wrong_variants_have_no_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ways = {name: WAYS[name] for name in ("none", "zero-1", "zero-2", "zero-3", "ddp-gloo")}
    case, results = BENCH.run_model("tiny", ways, steps=2, kind=Wrong, say=lambda line: None)
    refused = {r.variant: r.refused for r in results if r.refused}
    assert set(refused) == {"none", "zero-1", "zero-2", "ddp-gloo"}
    assert "200.0 % of a share is stepped" in refused["none"]
    assert "the first step of embedding.weight is off by" in refused["zero-2"]
    assert "the ranks hold different weights, first embedding.weight" in refused["ddp-gloo"]
    assert "embedding.weight has no gradient" in refused["zero-1"]

    assert not BENCH.publish(results, case, ways, tmp_path)
    assert {row["variant"] for row in read(tmp_path / "bench_train_zero.csv")} == {"zero-3"}
    assert capsys.readouterr().out.count("REFUSED") == 4


@needs_compiler
def test_quick_run_writes_rows_and_charts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    variants = ["zero-1", "zero-3", "redundancy-gloo", "fsdp2-gloo", "fsdp2-pypar"]
    assert bench_train_zero.main(["--quick", "--variants", *variants, "--results", str(tmp_path)]) == 0
    rows = read(tmp_path / "bench_train_zero.csv")
    assert {row["variant"] for row in rows} == {"none", *variants}
    assert list(rows[0]) == [*harness.COLUMNS, *map(column, CATEGORIES), "efficiency", "tokens_per_s"]
    for row in rows:
        assert (row["op"], row["verified"], row["ranks"]) == ("train_tiny", "True", "2")
        none = next(r for r in rows if r["variant"] == "none" and r["regime"] == row["regime"])
        assert float(row["efficiency"]) == pytest.approx(float(none["median_us"]) / float(row["median_us"]), abs=1e-4)
        assert float(row[column("optimizer")]) > 0
        assert float(row[column("communication")]) > 0 or row["variant"] == "none"
    assert "where the time goes" in capsys.readouterr().out
    for name in ("bench_train_zero_tiny.png", "bench_train_zero_tiny_breakdown.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    assert category("pypar::zero_step") == "optimizer"


def test_default_variants(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(bench_train_zero, "has_deepspeed", lambda: True)
    assert list(ways_of(None, "small")) == list(WAYS)
    assert set(WAYS) - set(ways_of(None, "large")) == {"fsdp2-pypar", "deepspeed-1", "deepspeed-2", "deepspeed-3"}
    assert list(ways_of(["deepspeed-3"], "large")) == ["none", "deepspeed-3"]
    monkeypatch.setattr(bench_train_zero, "has_deepspeed", lambda: False)
    assert list(ways_of(["deepspeed-3", "zero-1"], "large")) == ["none", "zero-1"]
    assert "skipped, there is no deepspeed to import: deepspeed-3" in capsys.readouterr().out


def test_target_at_every_stage() -> None:
    case = case_of("large", 2)
    ms = {"none": 95.0, "zero-1": 100.0, "zero-2": 101.0, "zero-3": 99.0, "fsdp2-gloo": 190.0}
    results = [Result(case, name, "fast", [1e3 * value], line_ns=[(50, 50)]) for name, value in ms.items()]
    verdicts = {r.name: r.verdict(case.nbytes) for r in BENCH.efficiency(results, case, ways_of(list(ms), "large"))}
    assert verdicts == {"none": "", "zero-1": "PASS", "zero-2": "MISS", "zero-3": "PASS", "fsdp2-gloo": ""}


def test_the_baseline_steps_its_share_and_clears_all() -> None:
    model = GPT(CONFIGS["tiny"])
    shares = [ShareOfAdamW(model, rank, 3) for rank in range(3)]
    stepped = [p for share in shares for group in share.param_groups for p in group["params"]]
    assert sorted(map(id, stepped)) == sorted(map(id, model.parameters()))
    assert sum(share.percent for share in shares) == pytest.approx(100)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    shares[1].zero_grad()
    assert all(p.grad is None for p in model.parameters())


def test_first_step_is_that_of_adamw() -> None:
    before = [torch.randn(50), torch.randn(3, 4)]
    params = [torch.nn.Parameter(p.clone()) for p in before]
    for p in params:
        p.grad = torch.randn_like(p) * 1e-3
    grads = [p.grad for p in params]
    torch.optim.AdamW(params, **SETTINGS).step()
    assert first_step_wrong(["a", "b"], before, grads, params) == ""
    params[1].data[2, 3] += 0.1 * SETTINGS["lr"]
    assert "the first step of b is off by 0.1" in first_step_wrong(["a", "b"], before, grads, params)


@needs_compiler
def test_bench_of_a_step_is_right_and_holds_its_targets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    written: list[Any] = []
    monkeypatch.setattr(harness, "write_csv", lambda name, results: written.extend(results) or tmp_path)
    monkeypatch.setattr(zero_ops.report, "chart", lambda *args: tmp_path)
    assert zero_ops.main("zero_step", ["--sizes", "64K", "--rounds", "1"]) == 0
    assert {r.variant for r in written} == {*zero_ops.VARIANTS, zero_ops.BYTES}
    assert not any(r.refused for r in written)
    assert "best of gloo / pypar" in capsys.readouterr().out

    case = Case("zero_step", 128 << 20)
    ms = {"gloo all_reduce": 9.0, "gloo reduce_scatter": 8.0, "pypar": 4.0, zero_ops.BYTES: 3.0}
    results = [Result(case, name, "fast", [1e3 * value]) for name, value in ms.items()]
    ratios = zero_ops.ratios_of(results)
    assert [ratio.value(case.nbytes) for ratio in ratios] == [2.0, pytest.approx(4 / 3)]
    assert [ratio.verdict(case.nbytes) for ratio in ratios] == ["PASS", "MISS"]
