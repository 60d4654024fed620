"""Collectives of CUDA tensors that only move data, by NCCL: one call without a wait for the GPU, so that a graph can be
captured. As bytes, since NCCL doesn't know every type."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist

from pypar.reference.collectives import group_of


def _bytes(x: torch.Tensor) -> torch.Tensor:
    return x.reshape(-1).view(torch.uint8)


def _splits(given: list[int] | None, rows: int, world_size: int, what: str) -> list[int]:
    """Rows for each rank, or from each."""
    if given is None:
        if rows % world_size:
            raise ValueError(f"all_to_all: {rows} rows don't divide by {world_size} ranks; give {what}")
        return [rows // world_size] * world_size
    if len(given) != world_size or min(given) < 0:
        raise ValueError(f"all_to_all: {what} is {given}, expected rows of each of {world_size} ranks")
    return list(given)


def all_to_all(
    x: torch.Tensor, out_splits: list[int] | None, in_splits: list[int] | None, group_name: str
) -> torch.Tensor:
    group = group_of(group_name)
    if x.dim() == 0:
        raise ValueError("all_to_all: x has no dim 0 to split")
    sent = _splits(in_splits, x.shape[0], group.size(), "in_splits")
    received = _splits(out_splits, x.shape[0], group.size(), "out_splits")
    if sum(sent) != x.shape[0]:
        raise ValueError(f"all_to_all: in_splits {sent} don't add up to the {x.shape[0]} rows of x")
    out = x.new_empty(sum(received), *x.shape[1:])
    row = math.prod(x.shape[1:]) * x.element_size()
    dist.all_to_all_single(
        _bytes(out), _bytes(x.contiguous()), [n * row for n in received], [n * row for n in sent], group=group
    )
    return out


def all_to_all_out(
    out: torch.Tensor, x: torch.Tensor, out_splits: list[int] | None, in_splits: list[int] | None, group_name: str
) -> None:
    out.copy_(all_to_all(x, out_splits, in_splits, group_name))


def broadcast_(x: torch.Tensor, root: int, group_name: str) -> None:
    group = group_of(group_name)
    if not 0 <= root < group.size():
        raise ValueError(f"broadcast: root {root} is not a rank of the group, [0, {group.size()})")
    dense = x.contiguous()
    dist.broadcast(_bytes(dense), group=group, group_src=root)
    if dense is not x:
        x.copy_(dense)


def broadcast(x: torch.Tensor, root: int, group_name: str) -> torch.Tensor:
    out = x.clone(memory_format=torch.contiguous_format)
    broadcast_(out, root, group_name)
    return out
