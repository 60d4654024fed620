"""Runs the Triton matmuls of this rank in Triton's interpreter, on channels of CPU symmetric memory.

For the ranks of a test alone: importing this module turns the interpreter on for the whole process.
"""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"

import contextlib
import random
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import triton.language as tl
from triton._C.libtriton.ir import MEM_SEMANTIC
from triton.runtime import interpreter
from triton.runtime.jit import JITFunction

from pypar.channel import ABORT, Channel, channel_of
from pypar.triton_kernels import (
    all_gather_matmul,
    all_reduce,
    matmul_all_reduce,
    matmul_parts,
    matmul_reduce_scatter,
    signal,
    vocab_cross_entropy,
)
from pypar.triton_kernels.copy_engine import memory_at
from pypar.triton_kernels.matmul_tile import Config

POLLS = 100_000
MODULES = (
    signal,
    matmul_parts,
    matmul_reduce_scatter,
    matmul_all_reduce,
    all_gather_matmul,
    all_reduce,
    vocab_cross_entropy,
)

# Several programs, several tiles for each and for a flag, already for small matrices.
SMALL = Config(block_m=16, block_n=32, block_k=32, group_m=2, programs=2, rows=8, cols=64)
WITH_TMA = Config(block_m=32, block_n=32, block_k=32, group_m=2, programs=2, rows=16, cols=64, tma=True)


def _float32(handle: interpreter.TensorHandle) -> interpreter.TensorHandle:
    return interpreter.TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


def multiply_and_round_bfloat16_as_gpus_do() -> None:
    """Triton 3.9 interprets float32 to bfloat16 by cutting bits off, and a dot of bfloat16 by multiplying their bits as
    integers. GPUs round to the nearest, ties to even, and multiply the values; so does the interpreter from here on."""
    builder = interpreter.InterpreterBuilder
    cast, dot = builder.cast_impl, builder.create_dot

    def cast_impl(self: Any, src: Any, dst_type: Any) -> Any:
        if src.dtype.scalar == tl.float32 and dst_type.scalar == tl.bfloat16:
            rounded = torch.from_numpy(np.array(src.data, dtype=np.float32)).bfloat16()
            return interpreter.TensorHandle(rounded.view(torch.int16).numpy().view(np.uint16), tl.bfloat16)
        return cast(self, src, dst_type)

    def create_dot(self: Any, a: Any, b: Any, d: Any, *options: Any) -> Any:
        if a.dtype.scalar == tl.bfloat16:
            a, b = _float32(a), _float32(b)
        # In one layout, since numpy adds in another order for a transposed operand: the values alone decide.
        a, b = (interpreter.TensorHandle(np.ascontiguousarray(t.data), t.dtype) for t in (a, b))
        return dot(self, a, b, d, *options)

    builder.cast_impl, builder.create_dot = cast_impl, create_dot
    for name in ("create_fp_trunc", "create_fp_ext"):
        setattr(builder, name, lambda self, src, dst_type: self.cast_impl(src, dst_type))


def patch_each_module_once() -> None:
    """The interpreter patches triton.language anew for every call of a device function, a quarter of the time."""
    patched: set[str] = set()

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.fn.__module__ not in patched:
            patched.add(self.fn.__module__)
            interpreter._patch_lang(self.fn)
        return self.rewrite()(*args, **kwargs)

    interpreter.InterpretedFunction.__call__ = call


def rest_between_looks() -> None:
    """A wait that looks again (and then looks at the abort word, the only relaxed read) leaves the core to the rank
    that it waits for: there may be fewer cores than ranks."""
    rmw = interpreter.InterpreterBuilder.create_atomic_rmw

    def create_atomic_rmw(self: Any, op: Any, ptr: Any, val: Any, mask: Any, sem: Any, scope: Any) -> Any:
        if sem == MEM_SEMANTIC.RELAXED:
            time.sleep(1e-4)
        return rmw(self, op, ptr, val, mask, sem, scope)

    interpreter.InterpreterBuilder.create_atomic_rmw = create_atomic_rmw


def interpret_the_standard_library() -> None:
    """Whoever imports torch's compiler, as the server that ranks are forked from does, imports Triton, and what Triton
    wrote in itself (cdiv, zeros) is then to be compiled already."""
    for module in (tl, tl.standard, tl.core):
        for name, value in vars(module).copy().items():
            if isinstance(value, JITFunction):
                setattr(module, name, interpreter.InterpretedFunction(value.fn))


interpret_the_standard_library()
multiply_and_round_bfloat16_as_gpus_do()
patch_each_module_once()
rest_between_looks()


def channel(name: str, slot_bytes: int) -> Channel:
    """Of the world; a call of all ranks where it has to grow."""
    return channel_of(dist.group.WORLD, name, slot_bytes, "cpu")


def where(channel: Channel, polls: int = POLLS) -> dict[str, Any]:
    """The arguments of a launcher that say where it runs."""
    return {
        "pointers": channel.pointers,
        "rank": channel.rank,
        "world_size": channel.world_size,
        "slot_bytes": channel.slot_bytes,
        "polls": polls,
    }


def give_up(channel: Channel) -> None:
    """What a wait that ends does: the peers' waits end, too, and a test that has failed is over."""
    for address in channel.pointers.tolist():
        memory_at(address + 4 * ABORT, 4, torch.device("cpu")).view(torch.int32).fill_(1)


@contextlib.contextmanager
def replaced(name: str, make: Callable[[Any], Any], modules: tuple[Any, ...] = MODULES) -> Iterator[None]:
    """Within the block the kernels call make(original) for what they know as `name`."""
    kept = [(module, getattr(module, name)) for module in modules if hasattr(module, name)]
    if not kept:
        raise ValueError(f"no kernel calls {name}")
    for module, original in kept:
        setattr(module, name, make(original))
    try:
        yield
    finally:
        for module, original in kept:
            setattr(module, name, original)


@contextlib.contextmanager
def stalled(before: str, seed: int, most_us: int, share: float = 0.25, after: bool = False) -> Iterator[None]:
    """Sleeps up to most_us before (or after) that share of the calls of a device function: the same ones for a seed."""
    draw = random.Random(seed)

    def make(original: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            pause = draw.random() * most_us * 1e-6 if draw.random() < share else 0.0
            if not after:
                time.sleep(pause)
            result = original(*args, **kwargs)
            if after:
                time.sleep(pause)
            return result

        return call

    with replaced(before, make):
        yield
