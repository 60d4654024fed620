"""Collectives of CUDA tensors: csrc/cuda where all ranks reach each other's memory, else NCCL."""

from __future__ import annotations

import torch

from pypar.ops.gpu.decide import PIECE_BYTES, all_reduce_algorithm
from pypar.ops.gpu.reach import has_multicast
from pypar.ops.gpu.run import arguments, channel_for, cuda_kernels, peers_of, triton_kernels, where
from pypar.reference.all_gather import all_gather as all_gather_reference
from pypar.reference.all_reduce import all_reduce as all_reduce_reference
from pypar.reference.collectives import rows_per_rank
from pypar.reference.reduce_scatter import reduce_scatter as reduce_scatter_reference

TRITON_TYPES = (torch.float32, torch.bfloat16, torch.float16)
REDUCTIONS = ("sum", "avg", "product", "min", "max")
MULTIMEM_TYPES = (torch.float32, torch.bfloat16, torch.float16)
MULTIMEM_REDUCTIONS = ("sum", "avg")


def _padded(nbytes: int, world_size: int) -> int:
    """Bytes of world_size parts of a message, each of which begins at 16 bytes."""
    return world_size * (-(-nbytes // world_size) + 16)


def all_reduce_(x: torch.Tensor, op: str, group_name: str) -> None:
    x.copy_(all_reduce(x, op, group_name))


def all_reduce(x: torch.Tensor, op: str, group_name: str) -> torch.Tensor:
    kernel, group = cuda_kernels("all_reduce"), peers_of(x, group_name)
    triton = triton_kernels("all_reduce") if kernel is None and x.dtype in TRITON_TYPES else None
    if group is None or op not in REDUCTIONS or (kernel is None and triton is None):
        return all_reduce_reference(x, op, group_name)
    x = x.contiguous()
    out = torch.empty_like(x)
    can_multimem = (
        kernel is not None
        and op in MULTIMEM_REDUCTIONS
        and x.dtype in MULTIMEM_TYPES
        and has_multicast(group, x.device)
    )
    algorithm = all_reduce_algorithm(x.numel() * x.element_size(), can_multimem)
    numel = min(x.numel(), PIECE_BYTES // x.element_size())
    pieces = list(zip(x.view(-1).split(max(numel, 1)), out.view(-1).split(max(numel, 1)), strict=True))
    if triton is not None:
        slot = triton.all_reduce_bytes(numel, group.size(), x.dtype, algorithm)
        with channel_for(group, f"all_reduce {algorithm} in Triton", slot, x.device) as channel:
            for piece, to in pieces:
                triton.all_reduce(piece, op, algorithm, **where(channel), out=to)
            channel.after()
        return out
    nbytes, world = numel * x.element_size(), group.size()
    if algorithm == "multimem":
        with channel_for(group, "all_reduce multimem", nbytes + 16, x.device) as channel:
            if channel.multicast:
                for piece, to in pieces:
                    kernel(piece, to, op, algorithm, *arguments(channel), channel.multicast)
                return out
        algorithm = "two_shot"  # on every rank: a small tensor had multicast addresses, but this memory has none
    slot = world * 8 * (-(-nbytes // 4)) if algorithm == "one_shot" else 2 * _padded(nbytes, world)
    with channel_for(group, f"all_reduce {algorithm}", slot, x.device) as channel:
        for piece, to in pieces:
            kernel(piece, to, op, algorithm, *arguments(channel))
    return out


def reduce_scatter(x: torch.Tensor, op: str, group_name: str, splits: list[int] | None = None) -> torch.Tensor:
    kernel, group = cuda_kernels("reduce_scatter"), peers_of(x, group_name)
    if kernel is None or group is None or op not in REDUCTIONS:
        return reduce_scatter_reference(x, op, group_name, splits)
    x = x.contiguous()
    rows = rows_per_rank(x.shape[0], group.size(), splits)
    out = x.new_empty(rows[group.rank()], *x.shape[1:])
    width = x[:1].numel() if x.shape[0] else 0
    slot = group.size() * (max(rows) * width * x.element_size() + 16)
    with channel_for(group, "reduce_scatter", slot, x.device) as channel:
        sizes = [r * width for r in rows]
        kernel(x, out, sizes, op, *arguments(channel))
    return out


def all_gather(x: torch.Tensor, group_name: str, splits: list[int] | None = None) -> torch.Tensor:
    kernel, group = cuda_kernels("all_gather"), peers_of(x, group_name)
    if kernel is None or group is None:
        return all_gather_reference(x, group_name, splits)
    x = x.contiguous()
    rows = splits if splits is not None else [x.shape[0]] * group.size()
    out = x.new_empty(sum(rows), *x.shape[1:])
    width = out[:1].numel() if out.shape[0] else 0
    slot = sum(rows) * width * x.element_size() + 16 * group.size()
    with channel_for(group, "all_gather", slot, x.device) as channel:
        sizes = [r * width for r in rows]
        kernel(x, out, sizes, *arguments(channel))
    return out
