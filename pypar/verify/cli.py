"""`pypar verify`: a model under a plan, held against one process."""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from pypar.options import OPTIMIZERS, Parser, plan_of, positive
from pypar.trainer.errors import TrainError, reason
from pypar.trainer.presets import PRESETS

EXAMPLES = """\
examples:
  pypar verify --model llama-tiny --plan "pp=2 tp=2 schedule=zbv micro_batches=4"
  pypar verify --model path/to/config.json --plan plan.json --clip 1.0 --accumulate 2
  pypar verify --model my_file.py:make_model --plan "dp=2 zero=3" --float64

my_file.py: make_model() returns the module, or (module, batch), or (module, batch, loss_fn), the same each time under
torch's seed. Where it returns the module alone: make_batch(batch_size, seq_len) of the file gives the global batch of
each step (default: input_ids and labels, some of them padded), loss_fn(output, batch) the loss (default: the causal
language model's).
Under torchrun the job's own ranks are used: torchrun --nproc-per-node 4 -m pypar verify --model ... --plan "dp=2 tp=2"
Exit code: 0 all agree, 1 something differs (the table says what, where, on whose shard), a rank failed, 2 wrong input.
"""


def parser() -> argparse.ArgumentParser:
    top = Parser(
        prog="pypar verify",
        description="Starts the ranks of a plan on this host, runs a few steps, and compares loss, every gradient and "
        "every updated weight with one process.",
        epilog=EXAMPLES,
    )
    add = top.add_argument
    models = f"{', '.join(PRESETS)}, a Hugging Face config.json, the folder of a saved model, or FILE.py:FUNCTION"
    add("--model", required=True, help=models)
    add("--plan", required=True, help='"pp=2 dp=2 zero=3", or a file of JSON')
    add("--batch-size", type=positive, default=8, metavar="N", help="samples, over all ranks; default 8")
    add("--seq-len", type=positive, default=64, metavar="N", help="tokens of a sample; default 64")
    add("--steps", type=positive, default=3, metavar="N", help="of the optimizer; default 3")
    add("--accumulate", type=positive, default=1, metavar="N", help="batches per step; default 1")
    add("--optimizer", default="AdamW", choices=OPTIMIZERS, metavar="NAME",
        help=f"{', '.join(OPTIMIZERS)}; default AdamW, with eps 1e-5")  # fmt: skip
    add("--lr", type=float, default=1e-3, metavar="X", help="default 1e-3")
    add("--clip", type=float, metavar="X", help="the largest norm of the gradients")
    add("--freeze", action="append", default=[], metavar="TEXT", help="don't train parameters with this in their name")
    add("--dropout", type=float, metavar="P", help="every dropout rate of the model; one process then draws the plan's "
        "random numbers")  # fmt: skip
    add("--float64", action="store_true", help="all in float64, tolerance 1e-10: settles what float32 leaves in doubt")
    add("--rtol", type=float, metavar="X", help="default 1e-5, with --float64 1e-10")
    add("--atol", type=float, metavar="X", help="default 1e-6, with --float64 1e-10")
    add("--seed", type=int, default=0, metavar="N", help="of weights, batch and dropout; default 0")
    add("--timeout", type=float, default=300.0, metavar="SECONDS", help="of every wait between ranks; default 300")
    add("--all", action="store_true", help="list what agrees as well, where something does not")
    add("--json", action="store_true", help="print JSON instead of the table")
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0, 1 where something differs, 2 for wrong input. argv: without `verify`."""
    try:
        args = parser().parse_args(list(sys.argv[1:] if argv is None else argv))
        return run(args)
    except TrainError as error:
        print(f"pypar verify: error: {error}", file=sys.stderr)
        return error.exit_code
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def run(args: argparse.Namespace) -> int:
    """Prints the report. Raises TrainError."""
    from pypar import PlanError, init
    from pypar.testing import RankFailed
    from pypar.verify import verify
    from pypar.verify.steps import default_options

    plan = plan_of(args.plan)
    make, batches = _model(args)
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        init(timeout=timedelta(seconds=args.timeout))
    is_first = not dist.is_initialized() or dist.get_rank() == 0
    optimizer = getattr(torch.optim, args.optimizer)
    try:
        report = verify(
            make,
            plan,
            batches,
            optimizer=optimizer,
            options=default_options(optimizer, args.lr),
            steps=args.steps,
            clip=args.clip,
            accumulate=args.accumulate,
            freeze=args.freeze,
            dropout=args.dropout if isinstance(make, str) else None,
            dtype=torch.float64 if args.float64 else None,
            rtol=args.rtol,
            atol=args.atol,
            seed=args.seed,
            timeout_s=args.timeout,
            say=None if args.json else lambda text: print(text, flush=True),
        )
    except PlanError as error:
        raise TrainError(f"--plan {args.plan}: {error}") from error
    except ValueError as error:
        if isinstance(error.__cause__, TrainError):
            raise error.__cause__ from error
        raise TrainError(f"--model {args.model}: {reason(error, with_type=False)}") from error
    except RankFailed as error:
        causes = {text.strip().splitlines()[-1] for text in error.failures.values()}
        first = sorted(causes, key=lambda text: "PeerError" in text)[0]
        raise TrainError(f"the ranks failed: {first}", 1) from error
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        own = [frame for frame in frames if frame.filename == args.model.rpartition(":")[0]]
        where = (own or frames)[-1]
        raise TrainError(
            f"--model {args.model}: {reason(error)} ({where.filename}:{where.lineno}, in {where.name})"
        ) from error
    if is_first:
        print(report.to_json() if args.json else "\n" + report.table(args.all), flush=True)
    return 0 if report.ok else 1


class Preset:
    """Makes a model of Hugging Face from a configuration, to be trained; can be sent to the ranks."""

    def __init__(self, config: dict[str, Any], weights: str | None):
        self.config, self.weights = config, weights

    def __call__(self) -> Any:
        from pypar.trainer.model import create

        return create(self.config, self.weights).train()


def _model(args: argparse.Namespace) -> tuple[Any, Any]:
    """(what makes it, batches, or None where they come with the model)"""
    from pypar import user_file

    count = args.steps * args.accumulate
    if user_file.is_own(args.model):
        try:
            module, make = user_file.load(args.model)
            torch.manual_seed(args.seed)
            if user_file.made(args.model, make).batch is not None:
                return args.model, None
        except ValueError as error:
            raise TrainError(f"--model {error}") from error
        make_batch = getattr(module, "make_batch", None)
        if make_batch is not None:
            torch.manual_seed(args.seed)
            try:
                return args.model, [make_batch(args.batch_size, args.seq_len) for _ in range(count)]
            except Exception as error:
                raise TrainError(f"--model {args.model}: make_batch raised {reason(error)}") from error
        return args.model, _tokens(args, 64, count)
    from pypar.trainer.model import describe, require_extra, weights_folder

    require_extra()
    is_preset = args.model in PRESETS
    config = describe(args.model, 257 if is_preset else 1, 0, args.seq_len, args.dropout)
    return Preset(config, weights_folder(args.model)), _tokens(args, config["vocab_size"], count)


def _tokens(args: argparse.Namespace, vocab_size: int, count: int) -> list[dict[str, torch.Tensor]]:
    """Random sequences, of which every third has a padded end that does not count."""
    generator = torch.Generator().manual_seed(args.seed)
    batches = []
    for _ in range(count):
        ids = torch.randint(vocab_size, (args.batch_size, args.seq_len), generator=generator)
        labels = ids.clone()
        labels[::3, -max(1, args.seq_len // 4) :] = -100
        batches.append({"input_ids": ids, "labels": labels})
    return batches
