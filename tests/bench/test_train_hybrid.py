"""bench_train_hybrid: rows of a tiny model, verified; no number for what computes something else."""

from __future__ import annotations

import csv
import shutil
from pathlib import Path
from typing import Any

import pytest

from bench.bench_train_hybrid import BENCH, RANKS, baseline, main
from bench.hybrid_training import WAYS, HybridRank, Way
from bench.models import GPTConfig
from bench.steps import Built
from pypar import backend

pytestmark = [
    pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler, which the barrier of the bench needs"),
    pytest.mark.skipif(not backend.available(), reason="needs the compiled extension"),
]


class Wrong(HybridRank):
    """Plants what is wrong: dp-tp computes in another way than one process."""

    def build(self, way: Way, config: GPTConfig) -> Built:
        built = super().build(way, config)
        if way.kind == "pypar":
            shared: Any = built.module
            shared.module.norm.register_forward_hook(lambda _module, _args, output: 2 * output)
        return built


@pytest.mark.slow
def test_rows_of_every_way(tmp_path: Path):
    assert main(["--quick", "--results", str(tmp_path)]) == 0
    with (tmp_path / "bench_train_hybrid.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["variant"] for row in rows} == set(WAYS)
    assert all(float(row["efficiency"]) > 0 for row in rows)


def test_no_number_for_what_computes_something_else():
    ways = {name: WAYS[name] for name in (baseline(WAYS["dp-tp"]), "dp-tp")}
    _, results = BENCH.run_model("tiny", ways, 1, RANKS, Wrong, say=lambda _text: None)
    refused = {result.variant: result.refused for result in results}
    assert "the gradient of" in refused["dp-tp"] or "the loss is" in refused["dp-tp"]
    assert not refused["none-dp"]
