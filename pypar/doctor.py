"""`pypar doctor`: what is here, and which kernel each op will run."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import sys
from collections.abc import Iterator

import torch

from pypar import backend

OPS = ["all_reduce", "reduce_scatter", "all_gather", "all_to_all", "broadcast"]


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "absent"


def _huge_pages() -> str:
    try:
        with open("/sys/kernel/mm/transparent_hugepage/shmem_enabled") as f:
            return f.read().split("[")[1].split("]")[0]
    except (OSError, IndexError):
        return "unknown"


def report() -> Iterator[tuple[str, str]]:
    """(name, value) rows; also what the benches write beside their numbers."""
    from pypar import __version__

    yield "pypar", __version__
    yield "python", platform.python_version()
    yield "torch", torch.__version__
    for package in ("triton", "transformers"):
        yield package, _version(package)
    yield "machine", f"{platform.machine()}, {os.cpu_count()} cores, {len(os.sched_getaffinity(0))} usable here"
    yield "torch CPU capability", torch.backends.cpu.get_cpu_capability()
    yield "torch threads", str(torch.get_num_threads())
    yield "CUDA", torch.version.cuda or "torch was built without it"
    yield "compiled extension", backend.describe()
    yield "huge pages for shared memory", _huge_pages()
    if backend.available():
        yield "transport", "ranks of one host: shared memory (memfd); between hosts: gloo"
    else:
        yield "transport", "gloo"
    for op in OPS:
        yield f"torch.ops.pypar.{op}", backend.kernel_of(op)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="pypar doctor",
        description="Prints versions, processor features, transport, and which kernel each op will run.",
    )
    parser.parse_args(argv)
    rows = list(report())
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"{name:<{width}}  {value}")
    if not backend.available():
        print("pypar: the compiled extension is absent; the plain-torch references serve", file=sys.stderr)
    return 0
