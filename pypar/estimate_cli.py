"""`pypar estimate`: what a plan needs of memory and sends, before a run."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pypar import user_file
from pypar.options import OPTIMIZERS, Parser, plan_of, positive
from pypar.trainer.errors import TrainError, reason
from pypar.trainer.presets import PRESETS

EXAMPLES = """\
examples:
  pypar estimate --model llama-small --plan "dp=2 tp=2 zero=1" --batch-size 8 --seq-len 512
  pypar estimate --model path/to/saved/model --plan "pp=4 micro_batches=8 recompute=true" --chart estimate.png
  pypar estimate --model config.json --plan plan.json --json > estimate.json
  pypar estimate --model my_file.py:make_model --plan "tp=4 sequence_parallel=true" --optimizer SGD

my_file.py: make_model() returns the module. Where the file has them, make_batch(batch_size, seq_len) gives the global
batch (default: input_ids and labels) and loss_fn(output, batch) the loss (default: the causal language model's).
Nothing is downloaded, no weights are read, no ranks are started. docs/estimate.md says what is counted.
"""


def parser() -> argparse.ArgumentParser:
    top = Parser(
        prog="pypar estimate",
        description="Bytes that each rank of a plan holds, by kind, and sends per step, by axis.",
        epilog=EXAMPLES,
    )
    top.add_argument(
        "--model",
        required=True,
        help=f"{', '.join(PRESETS)}, a Hugging Face config.json, the folder of a saved model, or FILE.py:FUNCTION",
    )
    top.add_argument("--plan", default="dp=1", help='"pp=2 dp=2 zero=3", or a file of JSON; default one rank')
    top.add_argument("--batch-size", type=positive, default=8, metavar="N", help="samples, over all ranks; default 8")
    top.add_argument("--seq-len", type=positive, default=512, metavar="N", help="tokens of a sample; default 512")
    top.add_argument("--vocab-size", type=positive, default=257, metavar="N", help="of a preset; default 257: bytes")
    top.add_argument("--optimizer", default="AdamW", choices=OPTIMIZERS, metavar="NAME",
                     help=f"{', '.join(OPTIMIZERS)}; default AdamW")  # fmt: skip
    top.add_argument("--chart", type=Path, metavar="FILE", help="draw it: .png, .svg or .pdf")
    top.add_argument("--json", action="store_true", help="print JSON, in bytes, instead of the table, in MB")
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0, or 2 for wrong input. argv: without `estimate`."""
    try:
        args = parser().parse_args(list(sys.argv[1:] if argv is None else argv))
        print(run(args))
        return 0
    except TrainError as error:
        print(f"pypar estimate: error: {error}", file=sys.stderr)
        return error.exit_code


def run(args: argparse.Namespace) -> str:
    """What is to be printed. Raises TrainError."""
    from pypar import PlanError, estimate

    if args.chart is not None and args.chart.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise TrainError(f"--chart {args.chart}: give a name that ends in .png, .svg or .pdf")
    plan = plan_of(args.plan)
    module, batch, loss_fn = _model(args)
    try:
        found = estimate(module, plan, batch, optimizer=getattr(torch.optim, args.optimizer), loss_fn=loss_fn)
        if args.chart is not None:
            found.chart(args.chart)
    except PlanError as error:
        raise TrainError(f"--plan {args.plan}: {error}") from error
    except ModuleNotFoundError as error:
        raise TrainError(f"--chart needs matplotlib: pip install pypar[train] ({error})") from error
    except (ValueError, OSError) as error:
        raise TrainError(reason(error, with_type=False)) from error
    except Exception as error:
        raise TrainError(
            f"--model {args.model} fails in a step under --plan {args.plan}, as it would in a run: {reason(error)}"
        ) from error
    return found.to_json() if args.json else found.table()


def _model(args: argparse.Namespace) -> tuple[nn.Module, Any, Any]:
    """(module, batch, loss_fn)"""
    shape = (args.batch_size, args.seq_len)
    if user_file.is_own(args.model):
        return _own(args.model, shape)
    from pypar.trainer.model import create, describe, require_extra

    require_extra()
    is_preset = args.model in PRESETS
    config = describe(args.model, args.vocab_size if is_preset else 1, 0, args.seq_len, None)
    with torch.device("meta"):
        return create(config, None), shape, None


def _own(name: str, shape: tuple[int, int]) -> tuple[nn.Module, Any, Any]:
    try:
        loaded, make = user_file.load(name)
        module = user_file.make_model(name, lambda: _make(make))
    except ValueError as error:
        raise TrainError(f"--model {error}") from error
    make_batch = getattr(loaded, "make_batch", None)
    return module, shape if make_batch is None else make_batch(*shape), getattr(loaded, "loss_fn", None)


def _make(make: Any) -> Any:
    """Without weights where that works: a model may be larger than this machine."""
    try:
        with torch.device("meta"):
            return make()
    except (RuntimeError, NotImplementedError):  # it looks at values while it is built
        return make()
