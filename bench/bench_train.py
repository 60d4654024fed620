"""A training step on 2 ranks with one thread each: pypar.DataParallel and torch's DDP against no communication.

python -m bench.bench_train [--quick] [--model small large] [--variants none ddp-gloo dp-pypar] [--steps 10]

efficiency = time of the same compute and optimizer without communication ("none") / time of the step: medians of one
run, each step as long as its slowest rank. The variants take turns, step by step; before and after, every gradient of
every variant is held against one process that sees the whole batch.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from bench import harness, report
from bench.harness import Case, Result
from bench.models import CONFIGS
from bench.pool import RankPool
from bench.training import BATCH, BUCKET_MB, WAYS, TrainRank, TrainVariant, Way, case_of, model_of, tokens_per_step

BENCH = "bench_train"
DEFAULT_WAYS = ("none", "ddp-gloo", "ddp-pypar", "dp-pypar")
TARGET = (">=", 94.0)  # per cent, of pypar.DataParallel over pypar, on 2 ranks that learn a model of TARGET_MODELS
TARGET_MODELS = ("small", "large")
MIN_ROUNDS = 5  # of a regime, to be shown rather than "mixed" or a longer one
PLAUSIBLE = 102.0  # per cent; above, something else than communication slowed "none" down
PATIENCE = 2  # times --steps rounds at most; a step can outlast a regime, so that all rounds are mixed

EPILOG = """variants
  none           the plain module and its optimizer, no communication
  ddp-gloo       torch's DistributedDataParallel over gloo; ddp-pypar: over pypar
  dp-pypar       pypar.DataParallel over pypar, the gradients of nn.Linear produced in the bucket; dp-gloo: over gloo
  dp-pypar-copy  the same, those gradients copied into the bucket; dp-gloo-copy: over gloo

models (million parameters, tokens per rank and step; GiB of memory per variant on 2 ranks)
  small   12 layers, d 512, 8 heads, ff 1408: 43, 512; about 2
  large   8 layers, d 1024, 16 heads, ff 2816: 111, 256; about 3
  tiny    2 layers, d 64: a smoke test; its times mean nothing

A row per variant and regime goes to bench/results/bench_train.csv, a chart per model to bench_train_<model>.png.
Exit code 1: a variant computed something wrong; it has no row.
"""


def ways_of(names: Sequence[str], buckets_mb: Sequence[float]) -> dict[str, Way]:
    """name of the variant -> way; "none" is always there, first. With several bucket sizes the names tell them."""
    ways = {"none": WAYS["none"]}
    for name in names:
        for mb in buckets_mb if name != "none" else ():
            ways[name if len(buckets_mb) == 1 else f"{name} {mb:g} MiB"] = replace(WAYS[name], bucket_mb=mb)
    return ways


def usable(ways: dict[str, Way], say: Callable[[str], None] = print) -> dict[str, Way]:
    """Those that this installation has."""
    import torch.distributed as dist

    import pypar

    if pypar.backend.available() and "pypar" in dist.Backend.backend_list:
        return ways
    missing = [name for name, way in ways.items() if way.backend == "pypar"]
    if missing:
        say(f"skipped, the compiled extension is not there: {', '.join(missing)}")
    return {name: way for name, way in ways.items() if name not in missing}


def efficiency(results: Sequence[Result], case: Case, ways: dict[str, Way]) -> list[report.Ratio]:
    """Per cent, of the results of one regime; the target where there is one."""
    times = report.medians(results)

    def of(variant: str) -> Callable[[int], float | None]:
        def value(nbytes: int) -> float | None:
            both = times.get(("none", nbytes)), times.get((variant, nbytes))
            return 100 * both[0] / both[1] if both[0] and both[1] else None

        return value

    def limit(name: str) -> Callable[[int], tuple[str, float] | None]:
        percent = of(name)(case.nbytes)
        is_held = case.ranks == 2 and model_of(case) in TARGET_MODELS and ways[name] == WAYS["dp-pypar"]
        return lambda nbytes: TARGET if is_held and percent is not None and percent <= PLAUSIBLE else None

    return [report.Ratio(name, of(name), limit(name)) for name in ways]


def add_columns(results: Sequence[Result], case: Case, ways: dict[str, Way]) -> None:
    """efficiency and tokens per second, of each result by its own regime."""
    for regime in {r.regime for r in results if not r.refused}:
        mine = [r for r in results if r.regime == regime and not r.refused]
        ratios = {ratio.name: ratio.value(case.nbytes) for ratio in efficiency(mine, case, ways)}
        for r in mine:
            percent = ratios[r.variant]
            r.extra = {
                "efficiency": "" if percent is None else f"{percent / 100:.4f}",
                "tokens_per_s": f"{1e6 * tokens_per_step(case) / r.median_us:.1f}",
            }


def publish(results: Sequence[Result], case: Case, ways: dict[str, Way], folder: Path) -> bool:
    """Prints the table, writes the CSV rows and the chart. False when a variant was refused."""
    add_columns(results, case, ways)
    kept = harness.one_regime(results, MIN_ROUNDS)
    regime = next((r.regime for r in kept if r.regime), "no")
    ratios = efficiency(kept, case, ways)
    title = f"training step, {model_of(case)}: {case.nbytes / 4e6:.3g} million parameters, {case.ranks} ranks"
    print(f"\n{title}, one thread each, float32, {regime} regime")
    print(report.step_table(kept, ratios, tokens_per_step(case)))
    if any((ratio.value(case.nbytes) or 0) > PLAUSIBLE for ratio in ratios):
        print(f'above {PLAUSIBLE:g} %: something slowed "none" down; no verdict, measure again')
    others = sorted({r.regime for r in results if r.regime} - {regime})
    if others:
        print(f"regime {' and '.join(others)}: in the CSV")
    csv_path = harness.write_csv(BENCH, results, folder)
    png_path = report.bars(f"{BENCH}_{model_of(case)}", f"{title} ({regime} regime)", kept, ratios, folder)
    print(f"\n{csv_path}\n{png_path}")
    return not any(r.refused for r in results)


def run_model(
    model: str,
    ways: dict[str, Way],
    steps: int,
    num_ranks: int = 2,
    kind: type[TrainRank] = TrainRank,
    say: Callable[[str], None] = print,
) -> tuple[Case, list[Result]]:
    """Verifies and times the ways, in processes that are gone afterwards."""
    case, pool = case_of(model, num_ranks), RankPool(num_ranks, kind, ways)
    variants = [TrainVariant(name, pool, way) for name, way in ways.items()]
    try:
        return case, harness.run(variants, [case], steps, 0, say, min_samples=1, patience=PATIENCE)
    finally:
        pool.close()


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m bench.bench_train",
        description=__doc__.split("\n\n")[0] + "\n\n" + __doc__.split("\n\n")[2],
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("--quick", action="store_true", help="a few steps of the tiny model: does it run, is it right")
    p.add_argument("--model", nargs="+", choices=list(CONFIGS), default=["small"], help="one or more; default small")
    p.add_argument("--variants", nargs="+", choices=list(WAYS), default=list(DEFAULT_WAYS), metavar="V",
                   help=f"of the list below; default {' '.join(DEFAULT_WAYS)}; none is always run")  # fmt: skip
    p.add_argument("--steps", type=int, default=10, metavar="N",
                   help=f"timed steps of a variant in one regime, {PATIENCE} N in all at most; default 10")  # fmt: skip
    p.add_argument("--ranks", type=int, default=2, choices=range(2, 9), metavar="2..8")
    p.add_argument("--bucket-mb", type=float, nargs="+", default=[BUCKET_MB], metavar="MIB",
                   help=f"bucket size in MiB; several are compared with each other; default {BUCKET_MB:g}")  # fmt: skip
    p.add_argument("--results", type=Path, default=harness.RESULTS, metavar="FOLDER", help="for CSV rows and charts")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """1 when a variant was refused, else 0."""
    p = parser()
    args = p.parse_args(argv)
    if args.steps < 1 or min(args.bucket_mb) <= 0:
        p.error(f"--steps {args.steps} and --bucket-mb {args.bucket_mb} must be above 0")
    models, steps = (["tiny"], 5) if args.quick else (args.model, args.steps)
    ways = usable(ways_of(args.variants, args.bucket_mb))
    right = True
    for model in models:
        print(f"{model}: {', '.join(ways)}; {steps} steps in turn, batch {BATCH[model]} per rank")
        case, results = run_model(model, ways, steps, args.ranks)
        right = publish(results, case, ways, args.results) and right
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
