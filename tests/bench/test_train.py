"""bench_train: rows, tables and charts of a tiny model, and no number for a variant that computes something else."""

from __future__ import annotations

import csv
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench import bench_train, harness
from bench.bench_train import BENCH
from bench.harness import Case, Result
from bench.steps import case_of
from bench.training import WAYS, TrainRank, Way, tokens_per_step

pytestmark = pytest.mark.skipif(
    shutil.which("cc") is None, reason="no C compiler, which the barrier of the bench needs"
)
EXTRA = ["efficiency", "tokens_per_s"]


class Forgetful(TrainRank):
    """Plants what is wrong: ddp-gloo never reduces, and dp-gloo-copy forgets to once its steps are timed."""

    def wrap(self, way: Way, module: torch.nn.Module) -> torch.nn.Module:
        wrapped = super().wrap(way, module)
        if way == WAYS["ddp-gloo"]:
            wrapped.require_backward_grad_sync = False
        return wrapped

    def measure(self, variant: str, case: Case, iters: int, num_samples: int) -> list[float]:
        if variant == "dp-gloo-copy":
            self.of(variant, case).module.require_backward_grad_sync = False
        return super().measure(variant, case, iters, num_samples)


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_wrong_variants_have_no_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ways = bench_train.ways_of(["ddp-gloo", "dp-gloo", "dp-gloo-copy"], [25])
    case, results = BENCH.run_model("tiny", ways, steps=2, kind=Forgetful, say=lambda line: None)
    assert {r.variant: bool(r.refused) for r in results} == {
        "none": False, "ddp-gloo": True, "dp-gloo": False, "dp-gloo-copy": True,
    }  # fmt: skip
    refused = {r.variant: r.refused for r in results if r.refused}
    assert "the gradient of embedding.weight is off by" in refused["ddp-gloo"]
    assert "the ranks hold different weights, first embedding.weight" in refused["dp-gloo-copy"]

    assert not BENCH.publish(results, case, ways, tmp_path)
    rows = read(tmp_path / "bench_train.csv")
    assert {row["variant"] for row in rows} == {"none", "dp-gloo"}
    assert capsys.readouterr().out.count("REFUSED") == 2


def test_quick_run_writes_rows_and_chart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = ["--quick", "--variants", "dp-gloo", "--bucket-mb", "1", "25", "--results", str(tmp_path)]
    assert bench_train.main(args) == 0
    rows = read(tmp_path / "bench_train.csv")
    assert {row["variant"] for row in rows} == {"none", "dp-gloo 1 MiB", "dp-gloo 25 MiB"}
    assert list(rows[0]) == [*harness.COLUMNS, *EXTRA]
    for row in rows:
        assert (row["op"], row["verified"], row["ranks"]) == ("train_tiny", "True", "2")
        assert not [name for name, value in row.items() if not value and name != "choice"]
        assert row["choice"] == ("" if row["variant"] == "none" else f"bucket {row['variant'].split()[1]} MiB")
        none = next(r for r in rows if r["variant"] == "none" and r["regime"] == row["regime"])
        assert float(row["efficiency"]) == pytest.approx(float(none["median_us"]) / float(row["median_us"]), abs=1e-4)
    out = capsys.readouterr().out
    assert "efficiency" in out and "tokens/s" in out
    assert (tmp_path / "bench_train_tiny.png").read_bytes().startswith(b"\x89PNG")


def test_efficiency_its_target_and_tokens_are_of_one_regime() -> None:
    case = case_of("small", 2)
    times = {("none", "slow"): 97.0, ("dp-pypar", "slow"): 100.0, ("none", "fast"): 90.0, ("dp-pypar", "fast"): 100.0}
    results = [Result(case, name, regime, [1e3 * ms], line_ns=[(50, 50)]) for (name, regime), ms in times.items()]
    ways = bench_train.ways_of(["dp-pypar", "ddp-gloo"], [25])
    BENCH.add_columns(results, case, ways)
    assert [r.extra["efficiency"] for r in results] == ["1.0000", "0.9700", "1.0000", "0.9000"]
    assert results[0].extra["tokens_per_s"] == f"{2 * 2 * 256 / 0.097:.1f}" and tokens_per_step(case) == 1024
    verdicts = [
        {ratio.name: ratio.verdict(case.nbytes) for ratio in BENCH.efficiency(of_regime, case, ways)}
        for of_regime in (results[:2], results[2:], [results[0], replace(results[1], us=[80e3])])
    ]
    assert verdicts == [{"none": "", "dp-pypar": v, "ddp-gloo": ""} for v in ("PASS", "MISS", "")]  # 121 %: implausible


def test_file_with_other_columns_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "bench_train.csv"
    path.write_text("bench,model,median_ms\n")
    result = Result(case_of("tiny", 2), "none", "fast", [1.0], line_ns=[(50, 50)], extra={"efficiency": "1"})
    with pytest.raises(ValueError, match="move the file away"):
        harness.write_csv("bench_train", [result], tmp_path)
    assert path.read_text() == "bench,model,median_ms\n"
