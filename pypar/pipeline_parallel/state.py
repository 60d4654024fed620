"""Tensors that lie on several ranks, collected on rank 0."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn


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


def aliases_of(module: nn.Module) -> dict[str, str]:
    """{every second name of a parameter: the first}"""
    first_name = {id(p): n for n, p in module.named_parameters()}
    every = module.named_parameters(remove_duplicate=False)
    return {n: first_name[id(p)] for n, p in every if first_name[id(p)] != n}


@torch.no_grad()
def take(module: nn.Module, state: dict[str, torch.Tensor]) -> None:
    """Of full tensors, those that the module has. Raises ValueError."""
    for name, value in module.state_dict(keep_vars=True).items():
        if name not in state or state[name].shape != value.shape:
            have = list(state[name].shape) if name in state else "nothing"
            raise ValueError(f"load_full_state_dict: '{name}' is {list(value.shape)} here, and {have} there")
        value.copy_(state[name])
