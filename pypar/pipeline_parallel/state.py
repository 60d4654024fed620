"""Tensors that lie on several ranks, collected on rank 0."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist


def gather(mine: dict[str, torch.Tensor], group: dist.ProcessGroup) -> dict[str, torch.Tensor]:
    """{name: tensor} of all ranks on rank 0, of a name that several have the first rank's; {} elsewhere. Collective."""
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    mine = {name: tensor.detach() for name, tensor in mine.items()}
    everyone: list[Any] = [None] * world
    dist.all_gather_object(everyone, {n: (t.shape, t.dtype) for n, t in mine.items()}, group=group)
    found: dict[str, torch.Tensor] = {}
    for source, kinds in enumerate(everyone):
        for name, (shape, dtype) in kinds.items():
            if any(name in earlier for earlier in everyone[:source]):
                continue
            if rank == 0:
                found[name] = mine[name].clone() if source == 0 else torch.empty(shape, dtype=dtype)
                if source and found[name].numel():
                    dist.recv(found[name], group=group, group_src=source)
            elif rank == source and mine[name].numel():
                dist.send(mine[name].contiguous(), group=group, group_dst=0)
    return found
