"""What every bench does: verify, warm up, interleave, take medians, and write down where and when.

A bench is a list of variants and a list of cases. No variant is timed on a case that it did not get right, before and
after the timing; a variant that is wrong gets no row. Rounds go A B A B, so that a change of the machine's regime
(native.regime) meets every variant; the regime is probed around every case.
"""

from __future__ import annotations

import csv
import datetime
import math
import os
import platform
import statistics
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from bench import native

RESULTS = Path(__file__).resolve().parent / "results"
ALONE_BYTES = 64 << 10  # as kAloneBytes of bench/c/bench.h
COLUMNS = [
    *("date", "bench", "op", "variant", "nbytes", "ranks", "dtype", "median_us", "p20_us", "p80_us", "samples"),
    *("choice", "verified", "regime", "line_ns_before", "line_ns_after"),
    *("machine", "cpu", "cores", "torch", "pypar", "commit"),
]


@dataclass(frozen=True)
class Case:
    """One thing to time. nbytes: the full tensor (the input of reduce_scatter, the output of all_gather)."""

    op: str
    nbytes: int
    ranks: int = 2
    dtype: str = "float32"


class Variant(Protocol):
    """A way to do a case. Several may share processes; only one runs at a time."""

    name: str

    def skips(self, case: Case) -> bool:
        """True where this variant has no such op."""

    def verify(self, case: Case) -> str:
        """Does the case once on fresh data: "" when right, else what was wrong."""

    def measure(self, case: Case, iters: int, num_samples: int) -> list[float]:
        """Microseconds per op, num_samples times; each over iters ops, and of the slowest rank."""


@dataclass
class Result:
    """A variant on a case: what it gave, or why it was refused. choice: the configuration a reference picked."""

    case: Case
    variant: str
    us: list[float] = field(default_factory=list)
    refused: str = ""
    choice: str = ""
    line_ns: tuple[float, float] = (math.nan, math.nan)

    @property
    def median_us(self) -> float:
        return statistics.median(self.us)

    def quantile_us(self, q: float) -> float:
        ordered = sorted(self.us)
        return ordered[min(len(ordered) - 1, int(q * len(ordered)))]

    @property
    def regime(self) -> str:
        return native.regime(*self.line_ns)


def _guarded(result: Result, call: Callable[[], Any]) -> Any:
    """What call gives; when it raises, the variant is refused on this case and the bench goes on."""
    try:
        return call()
    except Exception as error:
        result.refused = f"{type(error).__name__}: {str(error)[:300]}"
        return None


def _verify(variant: Variant, result: Result) -> None:
    wrong = _guarded(result, lambda: variant.verify(result.case))
    if wrong:
        result.refused = f"wrong result: {wrong}"


def run_case(variants: Sequence[Variant], case: Case, rounds: int, budget_us: float) -> list[Result]:
    """Verifies, warms up and times every variant on one case, interleaved. budget_us: per variant and round."""
    results = [(v, Result(case, v.name)) for v in variants if not v.skips(case)]
    before_ns = native.line_latency_ns()
    plans: dict[str, tuple[int, int]] = {}
    for variant, result in results:
        _verify(variant, result)
        if result.refused:
            continue
        warm = _guarded(result, lambda v=variant: v.measure(case, 1 if case.nbytes >= ALONE_BYTES else 10, 3))
        if warm:
            us = max(min(warm), 0.05)
            iters = 1 if case.nbytes >= ALONE_BYTES else max(1, min(2000, int(200 / us)))
            plans[variant.name] = iters, max(3, min(100, int(budget_us / (us * iters))))
    for _ in range(rounds):
        for variant, result in results:
            if not result.refused:
                result.us += _guarded(result, lambda v=variant: v.measure(case, *plans[v.name])) or []
    for variant, result in results:
        if not result.refused:
            _verify(variant, result)
            result.choice = getattr(variant, "choice", "")
    after_ns = native.line_latency_ns()
    for _, result in results:
        result.line_ns = before_ns, after_ns
    return [result for _, result in results]


def run(
    variants: Sequence[Variant],
    cases: Sequence[Case],
    rounds: int = 5,
    budget_us: float = 20_000,
    say: Callable[[str], None] = lambda line: None,
) -> list[Result]:
    """run_case over all cases. say: told of every case and of every refusal."""
    results: list[Result] = []
    for case in cases:
        of_case = run_case(variants, case, rounds, budget_us)
        results += of_case
        say(f"{case.op} {size_name(case.nbytes)}: {of_case[0].regime if of_case else 'no variant'}")
        for result in of_case:
            if result.refused:
                say(f"  REFUSED {result.variant}: {result.refused}")
    return results


def size_name(nbytes: int) -> str:
    for unit, name in ((1 << 20, "MiB"), (1 << 10, "KiB")):
        if nbytes >= unit and nbytes % unit == 0:
            return f"{nbytes // unit} {name}"
    return f"{nbytes} B"


def _commit() -> str:
    def git(*args: str) -> str:
        done = subprocess.run(["git", *args], cwd=native.ROOT, capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else ""

    changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!bench/results")
    return git("rev-parse", "--short", "HEAD") + ("+changes" if changed else "")


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    facts = dict(reversed([tuple(part.strip() for part in line.split(":", 1)) for line in lines if ":" in line]))
    model = facts.get("model name") or platform.processor() or "unknown"
    return f"{model} (family {facts.get('cpu family', '?')} model {facts.get('model', '?')})"


def machine_facts() -> dict[str, Any]:
    """The columns that are the same in every row of a run."""
    import pypar

    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "torch": torch.__version__,
        "pypar": pypar.__version__,
        "commit": _commit(),
    }


def write_csv(bench: str, results: Sequence[Result], folder: Path = RESULTS) -> Path:
    """Appends a row per verified result to <folder>/<bench>.csv. A refused variant gets none."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{bench}.csv"
    facts = machine_facts()
    is_new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        if is_new:
            writer.writeheader()
        for r in results:
            if r.refused or not r.us:
                continue
            times = {"median_us": r.median_us, "p20_us": r.quantile_us(0.2), "p80_us": r.quantile_us(0.8)}
            probe = {"line_ns_before": r.line_ns[0], "line_ns_after": r.line_ns[1]}
            writer.writerow(
                {
                    **facts,
                    **{"bench": bench, "op": r.case.op, "variant": r.variant, "nbytes": r.case.nbytes},
                    **{"ranks": r.case.ranks, "dtype": r.case.dtype, "samples": len(r.us), "choice": r.choice},
                    **{"verified": True, "regime": r.regime},
                    **{name: f"{value:.3f}" for name, value in {**times, **probe}.items()},
                }
            )
    return path
