"""A training step of ZeRO, 2 ranks with one thread each: pypar.Zero, torch's FSDP2 and others, DeepSpeed.

python -m bench.bench_train_zero [--quick] [--model small large] [--variants zero-3 fsdp2-gloo] [--steps 10]

efficiency = time of the same compute and of AdamW on 1/N of the parameters, without communication ("none") / time of
the step: medians of one run, each step as long as its slowest rank. The variants take turns, step by step; before and
after, the loss and every gradient of every variant are held against one process that sees the whole batch, and its
first step against AdamW's formula. A profile of each variant follows, untimed.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from bench.step_bench import MODELS, Limit, StepBench, parser
from bench.training import BATCH, tokens_per_step
from bench.zero_training import WAYS, ZeroTrainRank, ZeroWay, has_deepspeed

TARGETS = {"small": 93.0, "large": 95.0}  # per cent, at every stage
LEFT_OUT = {"large": ("fsdp2-pypar", "deepspeed-1", "deepspeed-2", "deepspeed-3")}  # unless named: for memory

EPILOG = f"""variants
  none             the plain module without communication; AdamW (fused) on 1/N of the parameters
  zero-1 -2 -3     pypar.Zero over pypar, by stage
  ddp-gloo         torch's DistributedDataParallel and AdamW (fused) over gloo
  redundancy-gloo  the same with ZeroRedundancyOptimizer
  fsdp2-gloo       torch's fully_shard on every block, and AdamW (fused), over gloo; fsdp2-pypar: over pypar
  deepspeed-1 ...  DeepSpeed's ZeRO over gloo with torch's AdamW (fused), where `import deepspeed` works

models (million parameters; tokens per rank and step: small 512, large 256; 1 to 2, 2 to 4 GiB of memory per variant)
{MODELS}
  By default the large one leaves out {", ".join(LEFT_OUT["large"])}.

Rows per variant and regime go to bench/results/bench_train_zero.csv, charts to bench_train_zero_<model>.png and,
where the time goes, bench_train_zero_<model>_breakdown.png. Exit code 1: a variant computed something wrong.
"""


def target(model: str, way: ZeroWay) -> Limit | None:
    return (">=", TARGETS[model]) if model in TARGETS and way.kind == "zero" else None


BENCH = StepBench("bench_train_zero", "ZeRO training step", ZeroTrainRank, tokens_per_step, target, breakdown_steps=1)


def ways_of(names: Sequence[str] | None, model: str) -> dict[str, ZeroWay]:
    """name of the variant -> way; "none" is always there, first. names: None for the model's default."""
    chosen = [name for name in WAYS if name not in LEFT_OUT.get(model, ())] if names is None else names
    if not has_deepspeed() and any(WAYS[name].kind == "deepspeed" for name in chosen):
        print(
            "skipped, there is no deepspeed to import: " + ", ".join(n for n in chosen if WAYS[n].kind == "deepspeed")
        )
        chosen = [name for name in chosen if WAYS[name].kind != "deepspeed"]
    return {name: WAYS[name] for name in dict.fromkeys(["none", *chosen])}


def main(argv: Sequence[str] | None = None) -> int:
    """1 when a variant was refused, else 0."""
    head, _usage, what = __doc__.split("\n\n")
    p = parser("python -m bench.bench_train_zero", f"{head}\n\n{what}", EPILOG, list(WAYS), ())
    p.set_defaults(variants=None)
    args = p.parse_args(argv)
    if args.steps < 1:
        p.error(f"--steps {args.steps} must be above 0")
    models, steps = (["tiny"], 5) if args.quick else (args.model, args.steps)
    right = True
    for model in models:
        ways = BENCH.usable(ways_of(args.variants, model))
        print(f"{model}: {', '.join(ways)}; {steps} steps in turn, batch {BATCH[model]} per rank")
        case, results = BENCH.run_model(model, ways, steps, args.ranks)
        right = BENCH.publish(results, case, ways, args.results) and right
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
