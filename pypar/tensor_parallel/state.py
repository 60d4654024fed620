"""Full tensors from the shards of all ranks, under the names that the full model has."""

from __future__ import annotations

import torch
from torch import nn

from pypar.tensor_parallel.exchange import gather
from pypar.tensor_parallel.shards import shards_of


def gather_full_state(module: nn.Module) -> dict[str, torch.Tensor]:
    """{name: full tensor} as the full model's state_dict has it, on every rank. A collective call of all ranks."""
    return _gather(module, module.state_dict(keep_vars=True), lambda t: t)


def gather_full_grads(module: nn.Module) -> dict[str, torch.Tensor]:
    """{name of a parameter that requires a gradient: its full gradient}, zeros where there is none (a rank with an
    empty shard can't know whether the others have one). A collective call of all ranks."""
    named = {n: p for n, p in module.named_parameters(remove_duplicate=False) if p.requires_grad}
    return _gather(module, named, lambda p: p.grad if p.grad is not None else torch.zeros_like(p))


def _gather(module, named, value) -> dict[str, torch.Tensor]:  # type: ignore[no-untyped-def]
    shards = {f"{prefix}.{n}" if prefix else n: s for prefix, m in _all(module) for n, s in shards_of(m).items()}
    done: dict[int, torch.Tensor] = {}  # a tied weight travels once
    full = {}
    with torch.no_grad():
        for name, tensor in named.items():
            if not isinstance(tensor, torch.Tensor):
                continue
            if id(tensor) not in done:
                shard, found = shards.get(name), value(tensor).detach()
                done[id(tensor)] = (
                    gather(found, shard.cut, shard.dim, shard.place.group_name) if shard else found.clone()
                )
            full[name] = done[id(tensor)]
    return full


def _all(module: nn.Module):  # type: ignore[no-untyped-def]
    return module.named_modules(remove_duplicate=False)
