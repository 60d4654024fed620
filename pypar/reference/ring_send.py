from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from pypar.reference.collectives import device_of, group_of

DTYPES = (
    torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.float16, torch.bfloat16, torch.float32,
    torch.float64, torch.bool,
)  # fmt: skip
MAX_DIMS = 7
FIRST = 4  # tensors that the first head describes
PER_TENSOR = 2 + MAX_DIMS


def heads_of(tensors: Sequence[torch.Tensor], tag: int) -> list[torch.Tensor]:
    """[number, tag, (dtype, ndim, sizes) of the first four], and a second head for the others, if there are any."""
    for x in tensors:
        if x.dim() > MAX_DIMS:
            raise ValueError(f"ring_send: a tensor of shape {list(x.shape)} has more than {MAX_DIMS} dims; flatten it")
    rows = [[DTYPES.index(x.dtype), x.dim(), *x.shape, *[0] * (MAX_DIMS - x.dim())] for x in tensors]
    first = torch.zeros(2 + FIRST * PER_TENSOR, dtype=torch.int64)
    first[0], first[1] = len(rows), tag
    known = torch.tensor(rows[:FIRST], dtype=torch.int64).reshape(-1)
    first[2 : 2 + known.numel()] = known
    more = torch.tensor(rows[FIRST:], dtype=torch.int64).reshape(-1)
    return [first, more] if more.numel() else [first]


def start_send(tensors: Sequence[torch.Tensor], tag: int, peer: int, group: dist.ProcessGroup) -> list[tuple[Any, Any]]:
    """(work, what must live until it is done) of every part of a message, on its way."""
    heads = [head.to(device_of(group)) for head in heads_of(tensors, tag)]
    parts = [*heads, *(x.detach().contiguous() for x in tensors if x.numel())]
    return [(dist.isend(part, group=group, group_dst=peer), part) for part in parts]


def ring_send(
    tensors: Sequence[torch.Tensor],
    mine: torch.Tensor,
    theirs: torch.Tensor,
    num_slots: int,
    tag: int,
    peer: int,
    group_name: str,
) -> None:
    for work, _ in start_send(tensors, tag, peer, group_of(group_name)):
        work.wait()
