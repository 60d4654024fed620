"""What the benches of training steps share: ways against a baseline, efficiency, table, CSV rows, charts."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench import harness, report
from bench.breakdown import CATEGORIES
from bench.harness import Case, Result
from bench.models import CONFIGS
from bench.pool import RankPool
from bench.steps import StepRank, StepVariant, case_of, model_of

MIN_ROUNDS = 5  # of a regime, to be shown rather than "mixed" or a longer one
PLAUSIBLE = 102.0  # per cent; above, something else than communication slowed the baseline down
DISTURBED = 3.0  # per cent of the baseline's time
PATIENCE = 2  # times --steps rounds at most; a step can outlast a regime, so that all rounds are mixed

MODELS = """\
  small   12 layers, d 512, 8 heads, ff 1408: 43
  large   8 layers, d 1024, 16 heads, ff 2816: 111
  tiny    4 layers, d 64: a smoke test; its times mean nothing"""

Limit = tuple[str, float]  # (">=", per cent)
Ways = dict[str, Any]  # name of the variant -> way


def _no_choice(way: Any) -> str:
    return ""


@dataclass(frozen=True)
class StepBench:
    """name: of the CSV file. title: what a step is. kind: the ranks. tokens: of a step, all ranks together.

    target(model, way): of the efficiency on target_ranks. baseline(way): the variant that does the same compute alone.
    choice(way): what goes into that column. breakdown_steps: profiled steps of each variant after the timing.
    """

    name: str
    title: str
    kind: type[StepRank]
    tokens: Callable[[Case], int]
    target: Callable[[str, Any], Limit | None]
    baseline: Callable[[Any], str] = field(default=lambda way: "none")
    choice: Callable[[Any], str] = _no_choice
    breakdown_steps: int = 0
    target_ranks: int = 2

    def usable(self, ways: Ways, say: Callable[[str], None] = print) -> Ways:
        """Those that this installation has."""
        import torch.distributed as dist

        import pypar

        if pypar.backend.available() and "pypar" in dist.Backend.backend_list:
            return ways
        missing = [name for name, way in ways.items() if way.backend == "pypar"]
        if missing:
            say(f"skipped, the compiled extension is not there: {', '.join(missing)}")
        return {name: way for name, way in ways.items() if name not in missing}

    def efficiency(self, results: Sequence[Result], case: Case, ways: Ways) -> list[report.Ratio]:
        """Per cent, of the results of one regime; the target where there is one."""
        times = report.medians(results)

        def of(variant: str) -> Callable[[int], float | None]:
            def value(nbytes: int) -> float | None:
                both = times.get((self.baseline(ways[variant]), nbytes)), times.get((variant, nbytes))
                return 100 * both[0] / both[1] if both[0] and both[1] else None

            return value

        def limit(name: str) -> Callable[[int], Limit | None]:
            percent = of(name)(case.nbytes)
            target = self.target(model_of(case), ways[name]) if case.ranks == self.target_ranks else None
            return lambda nbytes: target if percent is not None and percent <= PLAUSIBLE else None

        return [report.Ratio(name, of(name), limit(name)) for name in ways]

    def add_columns(self, results: Sequence[Result], case: Case, ways: Ways) -> None:
        """efficiency and tokens per second, of each result by its own regime."""
        for regime in {r.regime for r in results if not r.refused}:
            mine = [r for r in results if r.regime == regime and not r.refused]
            ratios = {ratio.name: ratio.value(case.nbytes) for ratio in self.efficiency(mine, case, ways)}
            for r in mine:
                percent = ratios[r.variant]
                r.extra |= {
                    "efficiency": "" if percent is None else f"{percent / 100:.4f}",
                    "tokens_per_s": f"{1e6 * self.tokens(case) / r.median_us:.1f}",
                }

    def publish(self, results: Sequence[Result], case: Case, ways: Ways, folder: Path) -> bool:
        """Prints the tables, writes the CSV rows and the charts. False when a variant was refused."""
        self.add_columns(results, case, ways)
        kept = harness.one_regime(results, MIN_ROUNDS)
        regime = next((r.regime for r in kept if r.regime), "no")
        ratios = self.efficiency(kept, case, ways)
        title = f"{self.title}, {model_of(case)}: {case.nbytes / 4e6:.3g} million parameters, {case.ranks} ranks"
        print(f"\n{title}, one thread each, float32, {regime} regime")
        print(report.step_table(kept, ratios, self.tokens(case)))
        if any((ratio.value(case.nbytes) or 0) > PLAUSIBLE for ratio in ratios):
            print(f"above {PLAUSIBLE:g} %: something slowed the baseline down; no verdict, measure again")
        others = sorted({r.regime for r in results if r.regime} - {regime})
        if others:
            print(f"regime {' and '.join(others)}: in the CSV")
        csv_path = harness.write_csv(self.name, results, folder)
        name = f"{self.name}_{model_of(case)}"
        paths = [csv_path, report.bars(name, f"{title} ({regime} regime)", kept, ratios, folder)]
        parts = {
            r.variant: {c: float(r.extra[column(c)]) for c in CATEGORIES} for r in kept if column("python") in r.extra
        }
        if parts:
            print("\nwhere the time goes, ms of a step (its own run, with the profiler; see bench/breakdown.py)")
            print(report.part_table(parts, CATEGORIES))
            paths.append(
                report.stacked(f"{name}_breakdown", f"where the time goes: {title}", parts, CATEGORIES, folder)
            )
        print("\n" + "\n".join(map(str, paths)))
        return not any(r.refused for r in results)

    def run_model(
        self,
        model: str,
        ways: Ways,
        steps: int,
        num_ranks: int = 2,
        kind: type[StepRank] | None = None,
        say: Callable[[str], None] = print,
    ) -> tuple[Case, list[Result]]:
        """Verifies, times and profiles the ways, in processes that are gone afterwards."""
        case, pool = case_of(model, num_ranks), RankPool(num_ranks, kind or self.kind, ways)
        variants = [StepVariant(name, pool, self.choice(way)) for name, way in ways.items()]
        try:
            results = harness.run(variants, [case], steps, 0, say, min_samples=1, patience=PATIENCE)
            for name in dict.fromkeys(map(self.baseline, ways.values())):
                if any(r.variant == name and r.us for r in results):
                    # Ranks that outnumber the cores wait for each other: that is no other process's doing.
                    each_other = 100 * (1 - min(1, (os.cpu_count() or 1) / num_ranks))
                    percent = max(0.0, max(pool.ask("off_core", name)) - each_other)
                    hint = "; the machine was not idle: don't compare these times" if percent > DISTURBED else ""
                    say(f"  other processes took {percent:.1f} % of the time of {name}{hint}")
            for variant in variants if self.breakdown_steps else ():
                mine = [r for r in results if r.variant == variant.name and not r.refused]
                try:
                    parts = variant.profile(case, self.breakdown_steps) if mine else {}
                except (RuntimeError, TimeoutError) as error:  # the times are there, and stay
                    say(f"  no breakdown of {variant.name}: {str(error).strip().splitlines()[-1]}")
                    parts = {}
                for r in mine:
                    r.extra |= {column(name): f"{us / 1e3:.3f}" for name, us in parts.items()}
            return case, results
        finally:
            pool.close()


def column(category: str) -> str:
    return f"{category.replace(' ', '_')}_ms"


def parser(
    prog: str, description: str, epilog: str, names: Sequence[str], default: Sequence[str]
) -> argparse.ArgumentParser:
    """The options that every bench of training steps has. names: of all variants."""
    p = argparse.ArgumentParser(
        prog=prog, description=description, epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--quick", action="store_true", help="a few steps of the tiny model: does it run, is it right")
    p.add_argument("--model", nargs="+", choices=list(CONFIGS), default=["small"], help="one or more; default small")
    p.add_argument("--variants", nargs="+", choices=list(names), default=list(default), metavar="V",
                   help=f"of the list below; default {' '.join(default)}; a baseline is always run")  # fmt: skip
    p.add_argument("--steps", type=int, default=10, metavar="N",
                   help=f"timed steps of a variant in one regime, {PATIENCE} N in all at most; default 10")  # fmt: skip
    p.add_argument("--ranks", type=int, default=2, choices=range(2, 9), metavar="2..8")
    p.add_argument("--results", type=Path, default=harness.RESULTS, metavar="FOLDER", help="for CSV rows and charts")
    return p
