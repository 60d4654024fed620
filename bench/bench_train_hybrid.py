"""A training step of several methods at once, 4 ranks with one thread each: pypar.parallelize, and torch's parts.

python -m bench.bench_train_hybrid [--quick] [--model small] [--variants dp-tp torch-dp-tp] [--steps 5]

efficiency = time of the same shards' compute without any communication / time of the step: medians of one run, each
step as long as its slowest rank. The variants take turns, step by step. Before and after, loss and every gradient of
pypar's are held against one process; of torch's and of the baselines every gradient must be there and finite.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from bench.hybrid_training import WAYS, HybridRank, Way, tokens_per_step
from bench.step_bench import MODELS, Limit, StepBench, parser

RANKS = 4
TARGET = 90.0  # per cent
DEFAULT = tuple(name for name, way in WAYS.items() if way.kind != "none")

EPILOG = f"""variants (dp 2 x tp 2, or pp 2 x tp 2 with 8 micro-batches; the loss over the cut vocabulary)
  none-dp none-dp-zero none-pp
                 the baselines: a rank's shard of the model alone, on its share of the batch, AdamW on its parameters
  dp-tp dp-tp-zero1 dp-tp-zero3, pp-tp-1f1b pp-tp-zbv
                 pypar.parallelize over pypar; zbv with stages that may end inside of a block
  torch-dp-tp torch-fsdp-tp torch-pp-tp
                 DTensor with DistributedDataParallel, with fully_shard, with torch's 1F1B, over gloo

models (million parameters; 2048 tokens a step)
{MODELS}

Rows per variant and regime go to bench/results/bench_train_hybrid.csv, charts to bench_train_hybrid_<model>.png.
Exit code 1: a variant computed something wrong.
"""


def target(model: str, way: Way) -> Limit | None:
    return (">=", TARGET) if model != "tiny" and way.kind == "pypar" else None


def baseline(way: Way) -> str:
    return "none-pp" if way.layout == "pp" else "none-dp-zero" if way.zero else "none-dp"


BENCH = StepBench(
    "bench_train_hybrid", "hybrid training step", HybridRank, tokens_per_step, target, baseline, target_ranks=RANKS
)


def main(argv: Sequence[str] | None = None) -> int:
    """1 when a variant was refused, else 0."""
    head, _usage, what = __doc__.split("\n\n")
    p = parser("python -m bench.bench_train_hybrid", f"{head}\n\n{what}", EPILOG, list(WAYS), DEFAULT)
    args = p.parse_args(argv)
    models, steps = (["tiny"], 3) if args.quick else (args.model, args.steps)
    named = {name: WAYS[name] for name in args.variants}
    ways = {name: WAYS[name] for name in dict.fromkeys([*map(baseline, named.values()), *named])}
    right = True
    for model in models:
        print(f"{model}: {', '.join(ways)}; {steps} steps in turn, {RANKS} ranks")
        case, results = BENCH.run_model(model, ways, steps, RANKS)
        right = BENCH.publish(results, case, ways, args.results) and right
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
