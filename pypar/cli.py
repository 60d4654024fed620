"""The command `pypar`: finds the subcommand, imports only that one, and hands it the rest of the line."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

SUBCOMMANDS = {
    "train": ("pypar.trainer.main", "train a language model on this machine's cores, or under torchrun"),
    "verify": ("pypar.verify.cli", "hold a model under a plan against one process: loss, every gradient, every weight"),
    "chart": ("pypar.pipeline_parallel.chart", "draw a pipeline schedule: what each rank runs when, holds and idles"),
    "estimate": ("pypar.estimate_cli", "memory of every rank and bytes that it sends per step, before a run"),
    "bench": ("pypar.bench_cli", "measure collectives and training steps against gloo and others"),
    "convert": ("pypar.hybrid.convert", "turn a checkpoint into a Hugging Face folder, or the other way round"),
    "doctor": ("pypar.doctor", "print versions, CPU features, transport and which kernel each op will run"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `pypar SUBCOMMAND ...` and returns its exit code. argv: without the program's name."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    listing = "\n".join(f"  {name:<8} {text}" for name, (_, text) in SUBCOMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="pypar",
        usage="pypar [-h] [--version] {" + ",".join(SUBCOMMANDS) + "} ...",
        description="Train large language models on many ranks.",
        epilog=f"subcommands:\n{listing}\n\n`pypar SUBCOMMAND --help` explains each.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="store_true", help="print the version")
    if arguments and arguments[0] in SUBCOMMANDS:
        module = importlib.import_module(SUBCOMMANDS[arguments[0]][0])
        return int(module.main(arguments[1:]) or 0)
    if arguments and not arguments[0].startswith("-"):
        parser.error(f"no subcommand {arguments[0]!r}; there are {', '.join(SUBCOMMANDS)}")
    if parser.parse_args(arguments).version:
        import pypar

        print(f"pypar {pypar.__version__}")
        return 0
    parser.print_help()
    return 0 if not arguments else 2
