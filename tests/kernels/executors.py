"""Who can run an op: the same call, on a reference, the C++ kernel, or a GPU kernel on a CPU or on a GPU."""

from __future__ import annotations

import importlib
import importlib.util
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

CUDA_OPS = ("all_reduce", "reduce_scatter", "all_gather", "zero_gather", "zero_scatter", "zero_step", "ring")
TRITON_OPS = (
    "all_reduce",
    "all_gather_matmul",
    "matmul_reduce_scatter",
    "matmul_all_reduce",
    "vocab_cross_entropy",
    "linear_vocab_cross_entropy",
)


@dataclass(frozen=True)
class Executor:
    """find(op): the function with the signature of torch.ops.pypar.<op>; called in a rank."""

    name: str
    ops: tuple[str, ...]
    device: str
    backend: str
    find: Callable[[str], Callable[..., Any]]
    lacks: Callable[[int], str]  # for so many ranks: why it can't run here, or ""
    environment: tuple[tuple[str, str], ...] = ()


def _reference(op: str) -> Callable[..., Any]:
    return getattr(importlib.import_module(f"pypar.reference.{op.removeprefix('linear_')}"), op)


def _registered(op: str) -> Callable[..., Any]:
    return getattr(torch.ops.pypar, op)


def _gpu_function(op: str) -> Callable[..., Any]:
    rooms = [importlib.import_module(f"pypar.ops.gpu.{room}") for room in ("collectives", "matmuls", "zero", "loss")]
    return next(getattr(room, op) for room in rooms if hasattr(room, op))


def _emulated(op: str) -> Callable[..., Any]:
    from kernels import cuda_executor

    cuda_executor.load()
    return _gpu_function(op)


def _interpreted(op: str) -> Callable[..., Any]:
    from kernels import triton_matmul_executor  # noqa: F401  (mends two errors of the interpreter with bfloat16)

    assert os.environ["TRITON_INTERPRET"] == "1"
    return _gpu_function(op)


def _lacks_compiler(_: int) -> str:
    return "" if shutil.which("g++") else "g++ is not here"


def _lacks_triton(_: int) -> str:
    return "" if importlib.util.find_spec("triton") else "triton is not installed"


def _lacks_gpus(world: int) -> str:
    number = torch.cuda.device_count()
    return "" if number >= world else f"{number} of {world} GPUs are here"


ALL_OPS = tuple(dict.fromkeys(CUDA_OPS + TRITON_OPS))
EXECUTORS = {
    e.name: e
    for e in (
        Executor("reference", ALL_OPS, "cpu", "pypar", _reference, lambda _: ""),
        Executor("cpu", ALL_OPS, "cpu", "pypar", _registered, lambda _: ""),
        Executor(
            "triton-interpreter",
            TRITON_OPS,
            "cpu",
            "pypar",
            _interpreted,
            _lacks_triton,
            (("TRITON_INTERPRET", "1"),),
        ),
        Executor("cuda-emulated", CUDA_OPS, "cpu", "pypar", _emulated, _lacks_compiler),
        Executor("cuda", ALL_OPS, "cuda", "nccl", _registered, _lacks_gpus),
    )
}
