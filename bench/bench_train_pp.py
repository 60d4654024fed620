"""A training step of a pipeline, 2 ranks with one thread each, 8 micro-batches: pypar.Pipeline and torch's pipelining.

python -m bench.bench_train_pp [--quick] [--model small large] [--variants torch-1f1b-gloo pp-zbv-pypar] [--steps 10]

efficiency = compute / ranks / time of the step, where compute / ranks is what "none" takes: each rank runs the whole
model on its share of the micro-batches, and the optimizer on its share of the parameters. A schedule's bubble bounds
it: GPipe and 1F1B reach 8/9 of it on 2 ranks. The variants take turns, step by step; before and after, the loss and
every gradient are held against one process.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from bench.pipeline_training import MICRO_BATCHES, WAYS, PipelineRank, Way, tokens_per_step
from bench.step_bench import MODELS, Limit, StepBench, parser

DEFAULT_WAYS = tuple(WAYS)
BOUND = 100 * MICRO_BATCHES / (MICRO_BATCHES + 1)  # of GPipe and 1F1B on 2 ranks

EPILOG = f"""variants
  none                each rank the whole model on half of the micro-batches: compute / 2
  torch-gpipe-gloo    torch.distributed.pipelining over gloo; torch-1f1b-gloo, torch-zbv-gloo, torch-1f1b-pypar
  pp-gpipe-pypar      pypar.Pipeline over its rings; pp-1f1b-pypar, pp-zbh1-pypar, pp-zb2p-pypar, pp-zbv-pypar;
                      pp-gpipe-balanced, pp-1f1b-balanced, pp-zb2p-balanced, pp-zbv-balanced: stages that may end
                      inside a block

models (million parameters; 8 micro-batches of one sequence of 256 tokens)
{MODELS}

Rows per variant and regime go to bench/results/bench_train_pp.csv, charts to bench_train_pp_<model>.png.
Exit code 1: a variant computed something wrong.
"""


def target(model: str, way: Way) -> Limit | None:
    if model == "tiny" or way.kind != "pypar":
        return None
    return (">=", round(0.98 * BOUND, 1)) if way.schedule in ("gpipe", "1f1b") else (">=", 95.0)


BENCH = StepBench("bench_train_pp", "pipeline training step", PipelineRank, tokens_per_step, target)


def main(argv: Sequence[str] | None = None) -> int:
    """1 when a variant was refused, else 0."""
    head, _usage, what = (__doc__ or "").split("\n\n")
    p = parser("python -m bench.bench_train_pp", f"{head}\n\n{what}", EPILOG, list(WAYS), DEFAULT_WAYS)
    args = p.parse_args(argv)
    if args.steps < 1:
        p.error(f"--steps {args.steps} must be above 0")
    models, steps = (["tiny"], 5) if args.quick else (args.model, args.steps)
    ways = BENCH.usable({"none": WAYS["none"], **{name: WAYS[name] for name in args.variants}})
    right = True
    for model in models:
        print(f"{model}: {', '.join(ways)}; {steps} steps in turn, {MICRO_BATCHES} micro-batches")
        case, results = BENCH.run_model(model, ways, steps, args.ranks)
        right = BENCH.publish(results, case, ways, args.results) and right
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
