"""The command line of `pypar train`."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from typing import Any

from pypar.hybrid.plan import Plan
from pypar.options import Parser, plan_of
from pypar.pipeline_parallel.generators import NAMES
from pypar.trainer.config import TrainConfig
from pypar.trainer.errors import TrainError
from pypar.trainer.presets import PRESETS

EXAMPLES = """\
examples:
  pypar train --dp 2                                  the standard library's sources, two ranks, a few minutes
  pypar train --dp 2 --data book.txt notes/ --steps 500
  pypar train --tp 2 --model llama-small              each rank holds half of the model
  pypar train --dp 2 --tp 2                           four ranks: two halves of the model, twice
  pypar train --dp 2 --zero 3                         each rank keeps half of AdamW's moments, gradients and weights
  pypar train --pp 2 --schedule zbv                   each rank has some of the layers
  pypar train --pp 2 --dp 2 --tp 2 --zero 1           eight ranks: all of it
  pypar train --plan "pp=2 dp=2 zero=3 schedule=zbv"  the same in one option, or in a file of JSON
  pypar train --resume                                go on with the newest run
  pypar train --model path/to/saved/model --data corpus/ --lr 1e-4
  torchrun --nproc-per-node 4 -m pypar train --tp 2   the ranks of torchrun: dp 2 x tp 2
"""


def parser() -> argparse.ArgumentParser:
    """Options that were not given stay out of the namespace, so that a resumed run keeps its own values."""
    top = Parser(
        prog="pypar train",
        description="Train a decoder-only language model on local ranks, or under torchrun.",
        epilog=EXAMPLES,
        argument_default=argparse.SUPPRESS,
    )

    group = top.add_argument_group("model and data")
    _add(group, "model", str, f"{', '.join(PRESETS)}, a Hugging Face config.json, or the folder of a saved model")
    _add(group, "dropout", float, "every dropout rate of the model", "P")
    group.add_argument(
        "--data",
        nargs="+",
        metavar="PATH",
        help="text files or folders (default: the .py sources of Python's standard library)",
    )
    _add(
        group,
        "tokenizer",
        str,
        "a tokenizers JSON file, or `bytes` (default: the saved model's own, else bytes)",
        "FILE",
    )
    _add(group, "cache_dir", str, "where tokenised data is kept (default: pypar in the user's cache folder)", "DIR")
    _add(group, "val_fraction", float, "share of the tokens, by document, that is held out for validation", "P")

    group = top.add_argument_group("training")
    _add(group, "seq_len", int, "tokens per sequence")
    _add(group, "batch_size", int, "sequences per step, over all --dp ranks and --accumulate")
    _add(
        group,
        "accumulate",
        int,
        "backward passes that a rank splits its share of a batch into; with --pp: times --micro-batches",
    )
    _add(group, "steps", int, "optimizer steps")
    _add(group, "lr", float, "peak learning rate", "X")
    _add(group, "min_lr_ratio", float, "the cosine ends at this share of --lr", "X")
    _add(group, "warmup", int, "steps of linear warm-up")
    _add(group, "weight_decay", float, "AdamW's; not on norms and biases", "X")
    _add(group, "beta1", float, "AdamW's", "X")
    _add(group, "beta2", float, "AdamW's", "X")
    _add(group, "eps", float, "AdamW's", "X")
    _add(group, "clip", float, "norm that gradients are clipped to; 0: not clipped", "X")
    _add(group, "dtype", str, "bfloat16 computes under autocast, with float32 weights", choices=("float32", "bfloat16"))
    _add(group, "seed", int, "of weights, split, order and dropout")

    group = top.add_argument_group("ranks")
    _add(group, "dp", int, "data-parallel ranks, x --tp ranks to start here; leave it out under torchrun")
    _add(group, "tp", int, "tensor-parallel ranks that share each copy of the model, neighbours by rank")
    _add(
        group,
        "zero",
        int,
        "the --dp ranks share out the optimizer's states (1), the gradients too (2), the parameters too (3)",
        "STAGE",
    )
    _add(group, "pp", int, "ranks of a pipeline, each with some of the model's layers")
    _add(group, "schedule", str, f"with --pp: {', '.join(NAMES)}", "NAME")
    text = "with --pp: parts of a batch that go through the pipeline one behind the other; times --accumulate"
    _add(group, "micro_batches", int, text)
    _add(
        group,
        "split",
        str,
        "with --pp: auto, or balanced: a stage may end inside of a block",
        choices=("auto", "balanced"),
    )
    _add(group, "replicate", int, "with --zero: so many of the --dp ranks hold the same shards (hybrid sharding)")
    group.add_argument("--recompute", action=argparse.BooleanOptionalAction,
                       help="compute the blocks' activations again in backward, to save memory")  # fmt: skip
    group.add_argument("--plan", metavar="PLAN",
                       help='all of these at once: a file of JSON, or "pp=2 dp=2 zero=3" (docs/hybrid.md)')  # fmt: skip
    group.add_argument(
        "--sequence-parallel",
        action=argparse.BooleanOptionalAction,
        help="with --tp: norms and dropout work on a part of the sequence each (default: on)",
    )
    _add(group, "backend", str, "process group (default: what pypar.init() chooses)", "NAME")
    _add(group, "device", str, "auto takes CUDA when there is any", choices=("auto", "cpu", "cuda"))
    _add(group, "threads", int, "threads per rank (default: cores / local ranks)")

    group = top.add_argument_group("output")
    _add(group, "out", str, "folder of the run (default: runs/MODEL, numbered when taken)", "DIR")
    group.add_argument(
        "--resume",
        nargs="?",
        const="latest",
        metavar="PATH",
        help="go on from a checkpoint or a run folder (default: the newest of --out, else of runs/)",
    )
    _add(group, "eval_every", int, "steps between validations; 0: only at the start and the end")
    _add(group, "eval_batches", int, "batches per validation; 0: the whole validation split")
    _add(group, "save_every", int, "steps between checkpoints; 0: only at the end")
    _add(group, "keep", int, "checkpoints to keep")
    _add(group, "log_every", int, "steps between printed lines when there is no terminal for a progress bar")
    _add(group, "prompt", str, "start of the sample text (default: the start of a validation document)", "TEXT")
    _add(group, "sample_tokens", int, "tokens to generate at the end; 0: none")
    _add(group, "temperature", float, "of the sample", "X")
    group.add_argument("--debug", action="store_true", help="tracebacks and the launcher's log; also PYPAR_DEBUG=1")
    return top


def _add(
    group: Any, name: str, kind: type, text: str, metavar: str | None = None, choices: Sequence[str] | None = None
) -> None:
    default = getattr(TrainConfig(), name)
    if default is not None:
        text += f" (default: {default})"
    shown = None if choices else metavar or name.split("_")[-1].upper()
    group.add_argument(f"--{name.replace('_', '-')}", type=kind, metavar=shown, choices=choices, help=text)


_FIELDS = (
    "pp", "dp", "tp", "zero", "replicate", "schedule", "micro_batches", "split", "sequence_parallel", "recompute",
)  # fmt: skip


def _fields(text: str) -> dict[str, Any]:
    """The settings that a plan stands for. Raises TrainError."""
    plan = plan_of(text)
    if plan.precision is not None:
        raise TrainError(f"--plan {text}: precision={plan.precision} is not for pypar train: use --dtype bfloat16")
    if not isinstance(plan.split, str):
        raise TrainError(f"--plan {text}: split is auto or balanced here")
    found = {name: getattr(plan, name) for name in _FIELDS}
    if plan.pp == 1:
        found |= {"accumulate": found.pop("micro_batches")}
    rest = dataclasses.replace(
        Plan(), **{n: getattr(plan, n) for n in ("num_stages", "carry", "tp_plan", "reduce", "order")}
    )
    return found | {"more_plan": str(rest)}


def parse(argv: Sequence[str]) -> tuple[dict[str, Any], str | None, bool]:
    """Returns (settings that were given, --resume or None, --debug). Raises TrainError; SystemExit(0) for --help."""
    given = vars(parser().parse_args(list(argv)))
    if "data" in given:
        given["data"] = tuple(given["data"])
    if "plan" in given:
        given = _fields(given.pop("plan")) | given
    return given, given.pop("resume", None), given.pop("debug", False)
