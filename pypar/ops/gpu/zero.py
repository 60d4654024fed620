"""ZeRO's ops of CUDA tensors: csrc/cuda where all ranks reach each other's memory, else NCCL."""

from __future__ import annotations

import functools
from typing import Any

import torch

from pypar.channel import Channel, channel_of_one
from pypar.ops.gpu.run import arguments, channel_for, cuda_kernels, peers_of
from pypar.reference.zero_gather import zero_gather as zero_gather_reference
from pypar.reference.zero_scatter import zero_scatter as zero_scatter_reference
from pypar.reference.zero_step import zero_step as zero_step_reference

GRADIENTS = (torch.float32, torch.bfloat16, torch.float16)


def zero_gather(full: torch.Tensor, shard: torch.Tensor, sizes: list[int], group_name: str) -> None:
    kernel, group = cuda_kernels("zero_gather"), peers_of(shard, group_name)
    if kernel is None or group is None or not full.is_contiguous() or not shard.is_contiguous():
        return zero_gather_reference(full, shard, sizes, group_name)
    slot = sum(sizes) * shard.element_size()
    with channel_for(group, "zero_gather", slot, shard.device) as channel:
        kernel(full, shard, sizes, *arguments(channel))
    return None


def zero_scatter(
    shard: torch.Tensor, full: torch.Tensor, sizes: list[int], scale: float, accumulate: bool, group_name: str
) -> torch.Tensor:
    kernel, group = cuda_kernels("zero_scatter"), peers_of(full, group_name)
    is_taken = full.dtype in GRADIENTS and shard.dtype == torch.float32
    if kernel is None or group is None or not is_taken or not full.is_contiguous() or not shard.is_contiguous():
        return zero_scatter_reference(shard, full, sizes, scale, accumulate, group_name)
    slot = group.size() * (max(sizes) * full.element_size() + 16)
    with channel_for(group, "zero_scatter", slot, full.device) as channel:
        return kernel(shard, full, sizes, scale, accumulate, *arguments(channel))


@functools.cache
def _alone(device: torch.device) -> Channel:
    return channel_of_one("zero_step", device)


def zero_step(
    param: torch.Tensor,
    grad: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    max_exp_avg_sq: torch.Tensor | None,
    low: torch.Tensor | None,
    *settings: Any,
) -> None:
    """The gradient is reduced already: a kernel of one rank, which exchanges nothing."""
    kernel = cuda_kernels("zero_step")
    given = [t for t in (param, grad, exp_avg, exp_avg_sq, max_exp_avg_sq) if t is not None]
    if kernel is None or any(t.dtype != torch.float32 or not t.is_contiguous() for t in given):
        return zero_step_reference(param, grad, exp_avg, exp_avg_sq, max_exp_avg_sq, low, *settings)
    flat = [t.view(-1) if t is not None else None for t in (param, grad, exp_avg, exp_avg_sq, max_exp_avg_sq)]
    kernel(*flat, None, None, [param.numel()], *settings, *arguments(_alone(param.device)))
    if low is not None:
        low.copy_(param)
    return None
