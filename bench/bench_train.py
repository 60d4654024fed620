"""A training step on 2 ranks with one thread each: pypar.DataParallel and torch's DDP against no communication.

python -m bench.bench_train [--quick] [--model small large] [--variants none ddp-gloo dp-pypar] [--steps 10]

efficiency = time of the same compute and optimizer without communication ("none") / time of the step: medians of one
run, each step as long as its slowest rank. The variants take turns, step by step; before and after, every gradient of
every variant is held against one process that sees the whole batch.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace

from bench.step_bench import MODELS, Limit, StepBench, parser
from bench.training import BATCH, BUCKET_MB, WAYS, TrainRank, Way, choice_of, tokens_per_step

DEFAULT_WAYS = ("none", "ddp-gloo", "ddp-pypar", "dp-pypar")

EPILOG = f"""variants
  none           the plain module and its optimizer, no communication
  ddp-gloo       torch's DistributedDataParallel over gloo; ddp-pypar: over pypar
  dp-pypar       pypar.DataParallel over pypar, the gradients of nn.Linear produced in the bucket; dp-gloo: over gloo
  dp-pypar-copy  the same, those gradients copied into the bucket; dp-gloo-copy: over gloo

models (million parameters; tokens per rank and step: small 512, large 256; 2 and 3 GiB of memory per variant)
{MODELS}

A row per variant and regime goes to bench/results/bench_train.csv, a chart per model to bench_train_<model>.png.
Exit code 1: a variant computed something wrong; it has no row.
"""


def target(model: str, way: Way) -> Limit | None:
    """Of pypar.DataParallel over pypar."""
    return (">=", 94.0) if model in ("small", "large") and way == WAYS["dp-pypar"] else None


BENCH = StepBench("bench_train", "training step", TrainRank, tokens_per_step, target, choice=choice_of)


def ways_of(names: Sequence[str], buckets_mb: Sequence[float]) -> dict[str, Way]:
    """name of the variant -> way; "none" is always there, first. With several bucket sizes the names tell them."""
    ways = {"none": WAYS["none"]}
    for name in names:
        for mb in buckets_mb if name != "none" else ():
            ways[name if len(buckets_mb) == 1 else f"{name} {mb:g} MiB"] = replace(WAYS[name], bucket_mb=mb)
    return ways


def main(argv: Sequence[str] | None = None) -> int:
    """1 when a variant was refused, else 0."""
    paragraphs = __doc__.split("\n\n")
    p = parser("python -m bench.bench_train", f"{paragraphs[0]}\n\n{paragraphs[2]}", EPILOG, list(WAYS), DEFAULT_WAYS)
    p.add_argument("--bucket-mb", type=float, nargs="+", default=[BUCKET_MB], metavar="MIB",
                   help=f"bucket size in MiB; several are compared with each other; default {BUCKET_MB:g}")  # fmt: skip
    args = p.parse_args(argv)
    if args.steps < 1 or min(args.bucket_mb) <= 0:
        p.error(f"--steps {args.steps} and --bucket-mb {args.bucket_mb} must be above 0")
    models, steps = (["tiny"], 5) if args.quick else (args.model, args.steps)
    ways = BENCH.usable(ways_of(args.variants, args.bucket_mb))
    right = True
    for model in models:
        print(f"{model}: {', '.join(ways)}; {steps} steps in turn, batch {BATCH[model]} per rank")
        case, results = BENCH.run_model(model, ways, steps, args.ranks)
        right = BENCH.publish(results, case, ways, args.results) and right
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
