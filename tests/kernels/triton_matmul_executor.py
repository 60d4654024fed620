"""Runs the Triton matmuls of this rank in Triton's interpreter, on channels of CPU symmetric memory.

Importing this module turns the interpreter on, for kernels that are decorated afterwards.
"""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import torch
import torch.distributed as dist
import triton.language as tl
from triton.runtime import interpreter

from pypar.channel import Channel, channel_of

POLLS = 200_000


def _float32(handle: interpreter.TensorHandle) -> np.ndarray:
    return (handle.data.astype(np.uint32) << 16).view(np.float32)


def round_bfloat16_as_gpus_do() -> None:
    """Triton 3.9 interprets float32 to bfloat16 by cutting bits off, and a dot of bfloat16 by multiplying their bits as
    integers. GPUs round to the nearest, ties to even, and multiply the values; so does the interpreter from here on."""
    builder = interpreter.InterpreterBuilder
    cast, dot = builder.cast_impl, builder.create_dot

    def cast_impl(self, src, dst_type):  # type: ignore[no-untyped-def]
        if src.dtype.scalar == tl.float32 and dst_type.scalar == tl.bfloat16:
            rounded = torch.from_numpy(np.array(src.data, dtype=np.float32)).bfloat16()
            return interpreter.TensorHandle(rounded.view(torch.int16).numpy().view(np.uint16), tl.bfloat16)
        return cast(self, src, dst_type)

    def create_dot(self, a, b, d, *options):  # type: ignore[no-untyped-def]
        if a.dtype.scalar == tl.bfloat16:
            a = interpreter.TensorHandle(_float32(a), tl.float32)
            b = interpreter.TensorHandle(_float32(b), tl.float32)
        return dot(self, a, b, d, *options)

    builder.cast_impl, builder.create_dot = cast_impl, create_dot
    for name in ("create_fp_trunc", "create_fp_ext"):
        setattr(builder, name, lambda self, src, dst_type: self.cast_impl(src, dst_type))


round_bfloat16_as_gpus_do()


def channel(name: str, slot_bytes: int) -> Channel:
    return channel_of(dist.group.WORLD, name, slot_bytes, "cpu")


def where(channel: Channel, polls: int = POLLS) -> dict:
    """The arguments of a launcher that say where it runs."""
    return {
        "pointers": channel.pointers,
        "rank": channel.rank,
        "world_size": channel.world_size,
        "slot_bytes": channel.slot_bytes,
        "polls": polls,
    }
