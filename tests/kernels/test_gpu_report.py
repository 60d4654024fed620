"""`make gpu` must end in a report on the first machine that has a GPU, so all of it runs here with emulated kernels."""

from __future__ import annotations

import csv

import pytest
import torch
from kernels.executors import EXECUTORS

from bench.gpu import report
from bench.gpu.__main__ import main, run_tests

EMULATED = ["--executor", "cuda-emulated", "--small", "--rounds", "1", "--ranks", "2"]


@pytest.mark.slow
def test_a_whole_run(tmp_path):
    if why := EXECUTORS["cuda-emulated"].lacks(2):
        pytest.skip(why)
    assert main([*EMULATED, "--select", "cuda-emulated and zero_step and 2", "--out", str(tmp_path)]) == 0
    text = (tmp_path / "report.md").read_text()
    assert "1 passed, 0 failed, 0 skipped" in text
    assert "compute-sanitizer" in text and "limit, measured in this run" in text
    rows = list(csv.DictReader((tmp_path / "times.csv").open()))
    assert {r["op"] for r in rows} == {"all_reduce", "reduce_scatter", "all_gather", "zero_step"}
    assert all(float(r["us"]) > 0 and float(r["share"]) > 0 for r in rows)
    assert (tmp_path / "times.png").stat().st_size > 1000


def test_no_gpu_is_said_and_no_stack_trace(tmp_path, capsys):
    if torch.cuda.device_count() >= 64:
        pytest.skip("64 GPUs are here")
    assert main(["--executor", "cuda", "--ranks", "64", "--out", str(tmp_path)]) == 2
    assert "64 GPUs are here" in capsys.readouterr().err


def test_a_suite_that_finds_nothing_is_in_the_report(tmp_path):
    cells = run_tests("cuda-emulated", tmp_path, "no_such_test")
    assert report.tests_table(cells).startswith("0 passed")


def test_failures_and_refusals_are_in_the_tables():
    text = report.tests_table([("a", "passed", ""), ("b", "failed", "bits differ\nmore"), ("c", "skipped", "no GPU")])
    assert text.startswith("1 passed, 1 failed, 1 skipped")
    assert "| b | bits differ |" in text and "Skipped: no GPU" in text
    row = {"op": "all_reduce", "size": "1 KiB", "dtype": "bfloat16", "variant": "pypar", "us": None, "refused": "wrong"}
    assert "| REFUSED | wrong |" in report.bench_table([row])
