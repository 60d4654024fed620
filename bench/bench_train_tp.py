"""A training step of tensor parallelism, 2 ranks with one thread each: pypar.tensor_parallel and torch's DTensor.

python -m bench.bench_train_tp [--quick] [--model small large] [--variants dtensor-gloo tp-pypar] [--steps 10]

efficiency = time of the same shard's compute with all communication removed / time of the step: medians of one run,
each step as long as its slowest rank. The variants take turns, step by step; before and after, the loss and every
gradient of every variant are gathered and held against one process. A profile of each variant follows, untimed.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from bench.step_bench import MODELS, Limit, StepBench, parser
from bench.tensor_training import BATCH, WAYS, TensorRank, Way, tokens_per_step

DEFAULT_WAYS = tuple(WAYS)
TARGETS = {"small": 95.0, "large": 96.0}  # per cent, of the better one of pypar's

EPILOG = f"""variants
  none            the shard's own compute by plain torch, no communication: the baseline of those without sp
  none-sp         the same, norms and residuals on a share of the sequence: the baseline of those with sp
  dtensor-gloo    torch's parallelize_module (Colwise, Rowwise, embedding and head cut over the vocabulary,
                  loss_parallel) over gloo; dtensor-pypar: over pypar
  dtensor-sp-...  the same with SequenceParallel norms
  tp-pypar        pypar.tensor_parallel, with the vocabulary-parallel loss
  tp-sp-pypar     the same, sequence parallel

models (million parameters; tokens per step: small 1024, large 768)
{MODELS}

Rows per variant and regime go to bench/results/bench_train_tp.csv, charts to bench_train_tp_<model>.png and,
where the time goes, bench_train_tp_<model>_breakdown.png. Exit code 1: a variant computed something wrong.
"""


def target(model: str, way: Way) -> Limit | None:
    return (">=", TARGETS[model]) if model in TARGETS and way.kind == "tp" else None


def baseline(way: Way) -> str:
    return "none-sp" if way.sequence else "none"


BENCH = StepBench(
    "bench_train_tp",
    "tensor-parallel training step",
    TensorRank,
    tokens_per_step,
    target,
    baseline,
    breakdown_steps=3,
)


def ways_of(names: Sequence[str]) -> dict[str, Way]:
    """name of the variant -> way, with the baselines that they need first."""
    baselines = dict.fromkeys(baseline(WAYS[name]) for name in names)
    return {name: WAYS[name] for name in [*baselines, *names]}


def main(argv: Sequence[str] | None = None) -> int:
    """1 when a variant was refused, else 0."""
    head, _usage, what = __doc__.split("\n\n")
    p = parser("python -m bench.bench_train_tp", f"{head}\n\n{what}", EPILOG, list(WAYS), DEFAULT_WAYS)
    args = p.parse_args(argv)
    if args.steps < 1:
        p.error(f"--steps {args.steps} must be above 0")
    models, steps = (["tiny"], 5) if args.quick else (args.model, args.steps)
    ways = BENCH.usable(ways_of(args.variants))
    right = True
    for model in models:
        print(f"{model}: {', '.join(ways)}; {steps} steps in turn, batch {BATCH[model]}")
        case, results = BENCH.run_model(model, ways, steps, args.ranks)
        right = BENCH.publish(results, case, ways, args.results) and right
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
