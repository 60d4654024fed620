"""Full tensors of a shared-out model under their original names, on rank 0."""

from __future__ import annotations

from collections.abc import Callable

import torch

from pypar.hybrid.model import HybridModel
from pypar.pipeline_parallel.state import aliases_of, gather
from pypar.tensor_parallel.exchange import gather as join
from pypar.tensor_parallel.state import shards_by_name

Tensors = dict[str, torch.Tensor]


def gather_state(model: HybridModel) -> Tensors:
    """{name: full tensor} as the full model's state_dict has it, on rank 0, copies; {} elsewhere. Collective."""
    if model.zero is None:
        return _collect(model, dict(model.module.state_dict()))
    with model.zero.whole():
        return _collect(model, dict(model.module.state_dict()))


def gather_grads(model: HybridModel) -> Tensors:
    """{name of a parameter that got a gradient: the full one, of the mean loss}, on rank 0; {} elsewhere.
    Collective."""
    if model.zero is not None:
        mine = model.zero.full_gradients()
    else:
        mine = {n: p.grad for n, p in model.module.named_parameters() if p.grad is not None}
    every = aliases_of(model.module)
    return _collect(model, mine | {n: mine[first] for n, first in every.items() if first in mine})


def gather_optimizer_state(model: HybridModel, optimizer: torch.optim.Optimizer) -> dict[str, Tensors]:
    """{name of a parameter: {name of a state: full tensor, or one without dims}}, on rank 0; {} elsewhere. Collective.
    A tied weight's is there once."""
    if model.zero is not None:
        states = model.zero.optimizer.full_state()
    else:
        inner = getattr(optimizer, "inner", optimizer)
        named = model.module.named_parameters()
        states = {n: {k: v for k, v in inner.state[p].items()} for n, p in named if inner.state.get(p)}
    mine = {
        f"{key}.{name}": value
        for name, state in states.items()
        for key, value in state.items()
        if isinstance(value, torch.Tensor)
    }
    found: dict[str, Tensors] = {}
    for full, value in _collect(model, mine, _without_key).items():
        key, name = full.partition(".")[0], _without_key(full)
        found.setdefault(model.aliases.get(name, name), {}).setdefault(key, value)
    return found


@torch.no_grad()
def load_optimizer_state(model: HybridModel, optimizer: torch.optim.Optimizer, full: dict[str, Tensors]) -> None:
    """Takes this rank's part of {name: {key: full tensor, or one without dims}}, as gather_optimizer_state gives it,
    from any plan; every rank has all of it. Copies.

    Raises ValueError for a name that is no trained parameter of the full model, and for another shape."""
    shards, named = shards_by_name(model.module), dict(model.module.named_parameters())
    aliases, known = model.aliases, model.trained
    unknown = next((name for name in full if name not in known), None)
    if unknown is not None:
        raise ValueError(f"optimizer state for {unknown}, which is no trained parameter of the model")
    mine: dict[str, Tensors] = {}
    for name in named:
        state = full.get(aliases.get(name, name))
        if not state:
            continue
        shard, shape = shards.get(name), known[aliases.get(name, name)]
        for key, tensor in state.items():
            if tensor.dim() and tuple(tensor.shape) != shape:
                raise ValueError(f"{key} of {name} is {tuple(tensor.shape)}, the full parameter is {shape}")
            is_cut = shard is not None and tensor.dim() > 0
            mine.setdefault(name, {})[key] = shard.take(tensor).contiguous() if is_cut else tensor  # type: ignore[union-attr]
    if model.zero is not None:
        model.zero.optimizer.load_full_state(mine)
        return
    states = getattr(optimizer, "inner", optimizer).state
    for name, state in mine.items():
        states[named[name]] = {key: tensor.to(named[name].device, copy=True) for key, tensor in state.items()}


def _without_key(name: str) -> str:
    return name.partition(".")[2]


@torch.no_grad()
def _collect(model: HybridModel, mine: Tensors, parameter_of: Callable[[str], str] = str) -> Tensors:
    """mine: whole over the data axis; what belongs to a parameter (parameter_of its name) that tensor parallel cuts is
    cut."""
    axes = model.axes
    if axes.tp_group is not None:
        shards = shards_by_name(model.module)
        joined = {}
        for name, tensor in mine.items():
            shard = shards.get(parameter_of(name))
            is_cut = shard is not None and tensor.dim() > shard.dim
            joined[name] = join(tensor.detach(), shard.cut, shard.dim, shard.place.group_name) if is_cut else tensor  # type: ignore[union-attr]
        mine = joined
    if axes.dp_rank or axes.tp_rank:
        return {}
    if axes.pp_group is None:
        return {name: tensor.detach().clone() for name, tensor in mine.items()}
    return gather(mine, axes.pp_group)
