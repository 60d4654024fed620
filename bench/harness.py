"""What every bench does: verify, warm up, interleave, take medians, and write down where and when.

A bench is a list of variants and a list of cases. No variant is timed on a case that it did not get right, before and
after the timing; a variant that is wrong gets no row. Rounds go A B A B. A virtual machine moves its cores between two
regimes (native.regime) every second or so, and times of different regimes can't be compared: so the regime is probed
before and after every round, and each regime has results of its own.
"""

from __future__ import annotations

import csv
import datetime
import os
import platform
import statistics
import subprocess
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from bench import native

RESULTS = Path(__file__).resolve().parent / "results"
ALONE_BYTES = 64 << 10  # as kAloneBytes of bench/c/bench.h
COLUMNS = [
    *(
        "date",
        "bench",
        "op",
        "variant",
        "nbytes",
        "ranks",
        "dtype",
        "median_us",
        "p20_us",
        "p80_us",
        "samples",
        "rounds",
    ),
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
    regime: str = ""
    us: list[float] = field(default_factory=list)
    refused: str = ""
    choice: str = ""
    line_ns: list[tuple[float, float]] = field(default_factory=list)  # before and after each round
    extra: dict[str, str] = field(default_factory=dict)  # columns of this bench alone

    @property
    def median_us(self) -> float:
        return statistics.median(self.us)

    def quantile_us(self, q: float) -> float:
        ordered = sorted(self.us)
        return ordered[min(len(ordered) - 1, int(q * len(ordered)))]


class _Timing:
    """A variant on a case while it is being timed: its samples by regime."""

    def __init__(self, variant: Variant, case: Case):
        self.variant, self.case, self.refused = variant, case, ""
        self.iters, self.num_samples = 1, 3
        self.by_regime: dict[str, Result] = {}

    def _call(self, what: Callable[[], Any]) -> Any:
        """What it gives; when it raises, this variant is refused on this case and the bench goes on."""
        if self.refused:
            return None
        try:
            return what()
        except Exception as error:
            self.refused = f"{type(error).__name__}: {str(error)[:300]}"
            return None

    def verify(self) -> None:
        wrong = self._call(lambda: self.variant.verify(self.case))
        if wrong:
            self.refused = f"wrong result: {wrong}"

    def warm_up(self, budget_us: float, min_samples: int) -> None:
        alone = self.case.nbytes >= ALONE_BYTES
        warm = self._call(lambda: self.variant.measure(self.case, 1 if alone else 10, 3))
        if warm:
            us = max(min(warm), 0.05)
            self.iters = 1 if alone else max(1, min(2000, int(200 / us)))
            self.num_samples = max(min_samples, min(100, int(budget_us / (us * self.iters))))

    def round(self) -> list[float]:
        return self._call(lambda: self.variant.measure(self.case, self.iters, self.num_samples)) or []

    def keep(self, us: list[float], line_ns: tuple[float, float]) -> None:
        regime = native.regime(*line_ns)
        result = self.by_regime.setdefault(regime, Result(self.case, self.variant.name, regime))
        result.us += us
        result.line_ns.append(line_ns)

    def results(self) -> list[Result]:
        if self.refused:
            return [Result(self.case, self.variant.name, refused=self.refused)]
        for result in self.by_regime.values():
            result.choice = getattr(self.variant, "choice", "")
        return list(self.by_regime.values())


def run_case(
    variants: Sequence[Variant], case: Case, rounds: int, budget_us: float, min_samples: int = 3, patience: int = 3
) -> list[Result]:
    """Verifies, warms up and times every variant on one case, interleaved.

    budget_us: per variant and round, which has at least min_samples samples all the same. Goes on until one regime has
    this many rounds, or patience times as many are over.
    """
    timings = [_Timing(variant, case) for variant in variants if not variant.skips(case)]
    for timing in timings:
        timing.verify()
        timing.warm_up(budget_us, min_samples)
    pure: Counter[str] = Counter()
    before_ns = native.line_latency_ns()
    for _ in range(patience * rounds):
        us = [timing.round() for timing in timings]
        line_ns = before_ns, native.line_latency_ns()
        for timing, samples in zip(timings, us, strict=True):
            timing.keep(samples, line_ns)
        before_ns = line_ns[1]
        regime = native.regime(*line_ns)
        pure[regime] += regime != "mixed"
        if pure[regime] >= rounds:
            break
    for timing in timings:
        timing.verify()
    return [result for timing in timings for result in timing.results()]


def one_regime(results: Sequence[Result], min_rounds: int = 1) -> list[Result]:
    """Of each case the results of one regime only, fit to be compared: fast if it has enough rounds, else the longest.

    Enough is 3, or min_rounds if that is more. "mixed" is the last choice: only where no other has min_rounds.
    """
    kept: list[Result] = []
    for case in dict.fromkeys(r.case for r in results):
        mine = [r for r in results if r.case == case]
        rounds = {r.regime: len(r.line_ns) for r in mine if not r.refused}
        order = {"mixed": 0, "slow": 1}
        longest = {name: n if name != "mixed" else min(n, min_rounds - 1) for name, n in rounds.items()}
        best = max(rounds, key=lambda name: (longest[name], order.get(name, 2)), default="")
        if rounds.get("fast", 0) >= max(3, min_rounds):
            best = "fast"
        kept += [r for r in mine if r.refused or r.regime == best]
    return kept


def run(
    variants: Sequence[Variant],
    cases: Sequence[Case],
    rounds: int = 5,
    budget_us: float = 20_000,
    say: Callable[[str], None] = lambda line: None,
    min_samples: int = 3,
    patience: int = 3,
) -> list[Result]:
    """run_case over all cases. say: told of every case and of every refusal."""
    results: list[Result] = []
    for case in cases:
        of_case = run_case(variants, case, rounds, budget_us, min_samples, patience)
        results += of_case
        rounds_of = {r.regime: len(r.line_ns) for r in of_case if not r.refused}
        say(f"{case.op} {size_name(case.nbytes)}: " + ", ".join(f"{n} rounds {name}" for name, n in rounds_of.items()))
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
    facts: dict[str, str] = {}
    for name, _, value in (line.partition(":") for line in lines):
        facts.setdefault(name.strip(), value.strip())  # the first core's
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
    """Appends a row per verified result to <folder>/<bench>.csv. A refused variant gets none.

    Raises ValueError for a file that has other columns, as an earlier version may have written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{bench}.csv"
    facts = machine_facts()
    columns = [*COLUMNS, *dict.fromkeys(name for r in results for name in r.extra)]
    is_new = not path.exists()
    if not is_new:
        there = path.read_text().partition("\n")[0].split(",")
        if not set(columns) <= set(there):
            missing = ", ".join(sorted(set(columns) - set(there)))
            raise ValueError(f"{path} has no column {missing}: move the file away, and run again")
        columns = there
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, columns)
        if is_new:
            writer.writeheader()
        for r in results:
            if r.refused or not r.us:
                continue
            times = {"median_us": r.median_us, "p20_us": r.quantile_us(0.2), "p80_us": r.quantile_us(0.8)}
            before_ns, after_ns = (statistics.median(ns) for ns in zip(*r.line_ns, strict=True))
            probe = {"line_ns_before": before_ns, "line_ns_after": after_ns}
            writer.writerow(
                {
                    **facts,
                    **{"bench": bench, "op": r.case.op, "variant": r.variant, "nbytes": r.case.nbytes},
                    **{"ranks": r.case.ranks, "dtype": r.case.dtype, "rounds": len(r.line_ns), "choice": r.choice},
                    **{"samples": len(r.us), "verified": True, "regime": r.regime},
                    **{name: f"{value:.3f}" for name, value in {**times, **probe}.items()},
                    **r.extra,
                }
            )
    return path
