"""What every GPU op does around its kernel: the group, its channel, and the error of a kernel that gave up."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from pypar.channel import Channel, channel_of
from pypar.ops.gpu.reach import reachable
from pypar.reference.collectives import group_of

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def cuda_kernels(op: str) -> Any:
    """torch.ops.pypar_cuda.<op>, or None where the build has no CUDA part."""
    return getattr(torch.ops.pypar_cuda, op, None)


def triton_kernels(op: str) -> Any:
    """The module pypar.triton_kernels.<op>, or None where triton is not installed."""
    if importlib.util.find_spec("triton") is None:
        return None
    return importlib.import_module(f"pypar.triton_kernels.{op}")


def peers_of(x: torch.Tensor, group_name: str) -> dist.ProcessGroup | None:
    """The group, where kernels can exchange such tensors in it; None: the process group has to."""
    group = group_of(group_name)
    if group.size() == 1 or x.dtype not in FLOATING or not reachable(group, x.device):
        return None
    return group


@contextmanager
def channel_for(group: dist.ProcessGroup, name: str, slot_bytes: int, device: torch.device) -> Iterator[Channel]:
    """The channel while a kernel is launched; a launch that fails because a kernel gave up raises what that said."""
    channel = channel_of(group, name, slot_bytes, device)
    try:
        yield channel
    except RuntimeError:
        channel.raise_error()
        raise


def arguments(channel: Channel) -> tuple[Any, ...]:
    """The last arguments of a CUDA launcher."""
    return channel.pointers, channel.rank, channel.slot_bytes, channel.timeout_s, channel.report


def where(channel: Channel) -> dict[str, Any]:
    """The arguments of a Triton launcher that say where it runs. Triton has no clock: a look takes about a microsecond
    on a GPU, and fifty in the interpreter."""
    looks_per_s = 1e6 if channel.memory.device.type == "cuda" else 2e4
    return {
        "pointers": channel.pointers,
        "rank": channel.rank,
        "world_size": channel.world_size,
        "slot_bytes": channel.slot_bytes,
        "polls": int(min(channel.timeout_s * looks_per_s, 2**31 - 1)),
    }
