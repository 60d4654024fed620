"""Full tensors from the shards of all ranks, under the names that the full model has."""

from __future__ import annotations

import torch
from torch import nn

from pypar.tensor_parallel.exchange import gather
from pypar.tensor_parallel.shards import Shard, shards_of


def gather_full_state(module: nn.Module) -> dict[str, torch.Tensor]:
    """{name: full tensor} as the full model's state_dict has it, on every rank. A collective call of all ranks."""
    return _gather(module, module.state_dict(keep_vars=True), lambda t: t)


def gather_full_grads(module: nn.Module) -> dict[str, torch.Tensor]:
    """{name of a parameter that requires a gradient: its full gradient}, zeros where there is none (a rank with an
    empty shard can't know whether the others have one). A collective call of all ranks."""
    named = {n: p for n, p in module.named_parameters(remove_duplicate=False) if p.requires_grad}
    return _gather(module, named, lambda p: p.grad if p.grad is not None else torch.zeros_like(p))


def gather_full_optimizer_state(
    module: nn.Module, optimizer: torch.optim.Optimizer
) -> dict[str, dict[str, torch.Tensor]]:
    """{name of a parameter: {key: its full state tensor}}, on every rank; scalars such as `step` as they are. A
    collective call of all ranks, whose parameters have state of the same keys."""
    named = {n: p for n, p in module.named_parameters() if optimizer.state.get(p)}
    full: dict[str, dict[str, torch.Tensor]] = {name: {} for name in named}
    for key in dict.fromkeys(key for p in named.values() for key in optimizer.state[p]):
        having = {n: p for n, p in named.items() if key in optimizer.state[p]}
        for name, tensor in _gather(module, having, lambda p, key=key: optimizer.state[p][key]).items():
            full[name][key] = tensor
    return full


def load_full_optimizer_state(
    module: nn.Module, optimizer: torch.optim.Optimizer, full: dict[str, dict[str, torch.Tensor]]
) -> None:
    """Gives the optimizer this rank's part of what gather_full_optimizer_state returned, on any number of ranks.

    Raises ValueError for a name that is no parameter of the module, or a shape that isn't the full parameter's.
    """
    named, shards = dict(module.named_parameters()), shards_by_name(module)
    for name, state in full.items():
        if name not in named:
            raise ValueError(f"optimizer state for {name}, which is no parameter of {type(module).__name__}")
        parameter, shard = named[name], shards.get(name)
        wanted = list(parameter.shape)
        if shard is not None:
            wanted[shard.dim] = shard.cut.full
        for key, tensor in state.items():
            if tensor.dim() and list(tensor.shape) != wanted:
                raise ValueError(f"{key} of {name} is {tuple(tensor.shape)}, the full parameter is {tuple(wanted)}")
            part = shard.take(tensor).contiguous() if shard is not None and tensor.dim() else tensor
            # A copy: neither a view that holds the full tensor nor the caller's own.
            optimizer.state[parameter][key] = part.to(parameter.device, copy=True)


def shards_by_name(module: nn.Module) -> dict[str, Shard]:
    """{name in the whole module: shard} of the parameters that are cut."""
    return {f"{prefix}.{n}" if prefix else n: s for prefix, m in _all(module) for n, s in shards_of(m).items()}


def _gather(module, named, value) -> dict[str, torch.Tensor]:  # type: ignore[no-untyped-def]
    shards = shards_by_name(module)
    done: dict[int, torch.Tensor] = {}  # a tied weight travels once
    full = {}
    with torch.no_grad():
        for name, tensor in named.items():
            if not isinstance(tensor, torch.Tensor):
                continue
            if id(tensor) not in done:
                shard, found = shards.get(name), value(tensor).detach()
                if shard is not None and found.shape == tensor.shape:
                    done[id(tensor)] = gather(found, shard.cut, shard.dim, shard.place.group_name)
                else:
                    done[id(tensor)] = found.clone()
            full[name] = done[id(tensor)]
    return full


def _all(module: nn.Module):  # type: ignore[no-untyped-def]
    return module.named_modules(remove_duplicate=False)
