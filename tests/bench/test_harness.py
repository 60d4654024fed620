"""The benches verify before and after they time, and write everything down."""

from __future__ import annotations

import csv
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench import harness, native, programs, ranks
from bench.collectives import Bench, parse_sizes, targets
from bench.harness import Case, Result
from bench.pool import RankPool

needs_compiler = pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
CASE = Case("all_reduce", 1 << 20)

# An all_reduce that leaves its input as it is.
WRONG_PROGRAM = """
#include "bench.h"
static void program_run(enum op op, size_t num, int root) { (void)op, (void)num, (void)root; }
static int program_num_configs(enum op op, size_t bytes) { return (void)op, (void)bytes, 1; }
static void program_use_config(enum op op, size_t bytes, int config, char* name, size_t size) {
    (void)op, (void)bytes, (void)config;
    snprintf(name, size, "default");
}
static int program_has(enum op op) { return op == kAllReduce; }
static void program_setup(int argc, char** argv) {
    ctx.rank = atoi(argv[argc - 2]), ctx.world = atoi(argv[argc - 1]);
    ctx.in = private_buffer(ctx.max_bytes), ctx.out = private_buffer(ctx.max_bytes);
}
static void program_end(void) {}
"""


class Fake:
    """Right `good` times, then wrong; says in `log` when it is timed."""

    def __init__(self, name: str, log: list[str], good: int = 1 << 30):
        self.name, self.log, self.good = name, log, good

    def skips(self, case: Case) -> bool:
        return case.op != "all_reduce"

    def verify(self, case: Case) -> str:
        self.good -= 1
        return "" if self.good >= 0 else "element 0 is 1, expected 2"

    def measure(self, case: Case, iters: int, num_samples: int) -> list[float]:
        self.log.append(self.name)
        return [float(k + 1) for k in range(num_samples)]


class Raises(Fake):
    def measure(self, case: Case, iters: int, num_samples: int) -> list[float]:
        raise OSError("gone")


@pytest.fixture(autouse=True)
def no_probe(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.node.name != "test_probe_is_plausible":
        monkeypatch.setattr(native, "line_latency_ns", lambda: 55.0)


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_wrong_variant_is_never_timed(tmp_path: Path) -> None:
    log: list[str] = []
    results = harness.run([Fake("right", log), Fake("wrong", log, good=0)], [CASE], rounds=2)
    assert set(log) == {"right"}
    assert "expected 2" in results[1].refused and results[1].us == []
    assert [row["variant"] for row in read(harness.write_csv("x", results, tmp_path))] == ["right"]


def test_variant_that_goes_wrong_while_timed_gets_no_row(tmp_path: Path) -> None:
    log: list[str] = []
    results = harness.run([Fake("late", log, good=1)], [CASE], rounds=2)
    assert log and results[0].refused and not results[0].us
    assert read(harness.write_csv("x", results, tmp_path)) == []


def test_variant_that_raises_does_not_stop_the_others() -> None:
    results = harness.run([Raises("gone", []), Fake("right", [])], [CASE], rounds=2)
    assert "OSError: gone" in results[0].refused
    assert results[1].us and not results[1].refused


def test_rounds_are_interleaved() -> None:
    log: list[str] = []
    harness.run([Fake("a", log), Fake("b", log)], [CASE], rounds=3)
    assert log[2:] == ["a", "b"] * 3  # the first two are the warm-up


def test_regimes_are_kept_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    probes = iter([50.0, 50, 50, 50, 240, 240, 50] + [50.0] * 99)
    monkeypatch.setattr(native, "line_latency_ns", lambda: next(probes))
    results = harness.run([Fake("a", []), Fake("b", [])], [CASE], rounds=4)
    assert {(r.variant, r.regime): len(r.line_ns) for r in results} == {
        (variant, regime): n for variant in "ab" for regime, n in {"fast": 4, "mixed": 2, "slow": 1}.items()
    }
    assert [(r.variant, r.regime) for r in harness.one_regime(results)] == [("a", "fast"), ("b", "fast")]


def test_csv_has_every_column_and_appends(tmp_path: Path) -> None:
    results = harness.run([Fake("a", [])], [CASE], rounds=1)
    harness.write_csv("x", results, tmp_path)
    rows = read(harness.write_csv("x", results, tmp_path))
    assert len(rows) == 2
    assert list(rows[0]) == harness.COLUMNS
    may_be_empty = {"choice"}
    assert not [name for name in harness.COLUMNS if not rows[0][name] and name not in may_be_empty]
    assert (rows[0]["regime"], rows[0]["nbytes"], rows[0]["verified"]) == ("fast", str(1 << 20), "True")


def test_regime() -> None:
    assert [native.regime(50, 60), native.regime(250, 240), native.regime(50, 240)] == ["fast", "slow", "mixed"]
    assert native.regime(float("nan"), 50) == "one core"


def test_targets_pass_and_miss() -> None:
    def of(variant: str, nbytes: int, us: float) -> Result:
        return Result(Case("all_reduce", nbytes), variant, "fast", [us])

    results = [of("gloo", 8, 100), of("pypar dist", 8, 6), of("gloo", 1 << 20, 100), of("pypar dist", 1 << 20, 20)]
    results += [of("pypar op", 1 << 20, 20), of("MPICH", 1 << 20, 30), of("reference staged", 1 << 20, 10)]
    verdicts = {ratio.name: (ratio.verdict(8), ratio.verdict(1 << 20)) for ratio in targets("all_reduce", 2, results)}
    assert verdicts["gloo / pypar dist"] == ("MISS", "PASS")
    assert verdicts["best peer / pypar op"] == ("", "PASS")
    assert verdicts["pypar op / reference staged"] == ("", "MISS")
    assert verdicts["pypar dist, us"] == ("PASS", "")


def test_sizes() -> None:
    assert parse_sizes("8,16K,1MiB") == (8, 16 << 10, 1 << 20)


@needs_compiler
def test_probe_is_plausible() -> None:
    ns = native.line_latency_ns(2000)
    assert ns != ns or 1 < ns < 100_000  # NaN with one core


@pytest.fixture(params=["staged", "symmetric"])
def reference(request: pytest.FixtureRequest) -> Iterator[programs.ProgramVariant]:
    variant = programs.reference(request.param, ranks=2, max_bytes=1 << 18)
    yield variant
    variant.program.close()


@needs_compiler
def test_references_verify_and_time(reference: programs.ProgramVariant) -> None:
    for op in programs.REFERENCE_OPS:
        for nbytes in (8, 4096, 1 << 17, 1 << 18):
            case = Case(op, nbytes)
            assert reference.verify(case) == ""
            us = reference.measure(case, 1, 3)
            assert len(us) == 3 and min(us) > 0
    with pytest.raises(ValueError, match="not offered"):
        reference.verify(Case("all_reduce", 1 << 19))


@needs_compiler
def test_program_that_computes_nothing_is_refused(tmp_path: Path) -> None:
    source = tmp_path / "wrong.c"
    source.write_text(WRONG_PROGRAM)
    path = native.build(str(source), flags=[f"-I{native.SOURCES}"], suffix="-test")
    program = programs.Program("wrong", 2, 4096, lambda c, m, d: [[str(path), c, m, str(r), "2"] for r in (0, 1)])
    try:
        variant = programs.ProgramVariant("wrong", program, {"all_reduce": "all_reduce"})
        assert "expected" in variant.verify(Case("all_reduce", 1024))
    finally:
        program.close()
        path.unlink()


@needs_compiler
def test_gloo_ranks_verify_time_and_report_what_fails() -> None:
    pool = RankPool(2, ranks.CollectiveRank, 1 << 17, False)
    try:
        gloo = ranks.CollectiveVariant("gloo", pool)
        for op in programs.REFERENCE_OPS:
            case = Case(op, 1 << 17)
            assert gloo.verify(case) == ""
            assert min(gloo.measure(case, 1, 2)) > 0
        with pytest.raises(RuntimeError, match="KeyError"):
            ranks.CollectiveVariant("nobody", pool).verify(CASE)
    finally:
        pool.close()


@needs_compiler
def test_bench_runs_one_op() -> None:
    with Bench(2, 4096, with_peers=False, say=lambda line: None) as bench:
        bench.variants = [v for v in bench.variants if v.name.startswith("reference")]
        results = bench.run("all_reduce", [8, 4096], rounds=2, budget_us=500, say=lambda line: None)
    assert [(r.variant, r.case.nbytes) for r in results] == [
        (f"reference {kind}", nbytes) for nbytes in (8, 4096) for kind in ("staged", "symmetric")
    ]
    assert all(r.us and not r.refused for r in results)
