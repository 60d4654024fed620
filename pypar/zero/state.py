"""The optimizer's states as full tensors by parameter name, from all ranks' shards and back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn

from pypar.zero.flat import FlatParameters

if TYPE_CHECKING:
    from pypar.zero.optimizer import ShardedOptimizer

MASTER = "master"  # the state that holds float32 weights of half-type parameters
SCALARS = ("step", "eta", "mu", "mu_product")  # of torch's optimizers: one number for the whole parameter
Place = tuple[FlatParameters, int, int, int]
Pieces = list[tuple[nn.Parameter, Place]]


def full_state(optimizer: ShardedOptimizer, dst: int | None) -> dict[str, dict[str, torch.Tensor]]:
    """See ShardedOptimizer.full_state."""
    found: dict[str, dict[str, torch.Tensor]] = {}
    for flat in optimizer.flats:
        mine = pieces_of(optimizer, flat)
        for key, scalar, having in state_names(optimizer, flat, mine):
            tensors = _gather(optimizer, flat, mine, key, scalar, having)
            if dst in (None, optimizer.rank):
                for name, tensor in tensors.items():
                    found.setdefault(name, {})[key] = tensor.clone()
    return found


def pieces_of(optimizer: ShardedOptimizer, flat: FlatParameters) -> Pieces:
    everything = (piece for group in optimizer.param_groups for piece in group["params"])
    return [(p, optimizer.places[id(p)]) for p in everything if optimizer.places[id(p)][0] is flat]


def states_of(optimizer: ShardedOptimizer, piece: nn.Parameter) -> dict[str, torch.Tensor]:
    """Of a piece, with its master weights where those are another tensor than the parameter's."""
    flat = optimizer.places[id(piece)][0]
    states = {k: v for k, v in optimizer.inner.state.get(piece, {}).items() if isinstance(v, torch.Tensor)}
    return states if flat.master is flat.own else states | {MASTER: piece.detach()}


def state_names(optimizer: ShardedOptimizer, flat: FlatParameters, mine: Pieces) -> list[tuple[str, bool, list[str]]]:
    """(name, has no dims, the parameters that have it) of every state that some rank has. Collective."""
    names = {
        (key, value.dim() == 0, optimizer.names[id(piece)])
        for piece, _ in mine
        for key, value in states_of(optimizer, piece).items()
    }
    everyone: list[Any] = [None] * flat.world_size
    dist.all_gather_object(everyone, sorted(names), group=flat.group)
    found: dict[tuple[str, bool], set[str]] = {}
    for key, scalar, name in (each for names in everyone for each in names):
        found.setdefault((key, scalar), set()).add(name)
    return [(*which, [n for n in flat.names if n in having]) for which, having in sorted(found.items())]


def _gather(
    optimizer: ShardedOptimizer, flat: FlatParameters, mine: Pieces, key: str, scalar: bool, having: list[str]
) -> dict[str, torch.Tensor]:
    """{name: the full state, a view}, of those parameters that have it."""
    begin, end = flat.layout.shard(flat.rank)
    if scalar:
        values = torch.zeros(len(flat.names), dtype=torch.float64)
    else:
        shard = torch.zeros(end - begin, dtype=flat.master.dtype, device=flat.device)
    for piece, (_, first, last, _) in mine:
        value = states_of(optimizer, piece).get(key)
        if value is None:
            continue
        if scalar:
            values[flat.names.index(optimizer.names[id(piece)])] = float(value)
        else:
            shard[first:last].copy_(value)
    if scalar:
        dist.all_reduce(values, op=dist.ReduceOp.MAX, group=flat.group)
        return {n: v.float() for n, v in zip(flat.names, values, strict=True) if n in having}
    views = flat.views(flat.join(shard))
    return {n: v for n, v in zip(flat.names, views, strict=True) if n in having}


@torch.no_grad()
def load_full_state(optimizer: ShardedOptimizer, full: dict[str, dict[str, torch.Tensor]]) -> None:
    """See ShardedOptimizer.load_full_state."""
    shapes = {n: s for flat in optimizer.flats for n, s in zip(flat.names, flat.shapes, strict=True)}
    for name, states in full.items():
        if name not in shapes:
            raise ValueError(f"pypar.Zero: state for '{name}', which is no trained parameter of the module")
        for key, value in states.items():
            if not is_scalar(key, value, shapes[name]) and value.shape != shapes[name]:
                raise ValueError(
                    f"pypar.Zero: {key} of '{name}' is {list(value.shape)}, the parameter {list(shapes[name])}"
                )
    for group in optimizer.param_groups:
        for piece in group["params"]:
            name, (_, begin, end, start) = optimizer.names[id(piece)], optimizer.places[id(piece)]
            for key, value in full.get(name, {}).items():
                scalar = is_scalar(key, value, shapes[name])
                set_state(optimizer, piece, key, value if scalar else value.reshape(-1)[start : start + end - begin])
    if any(flat.master is not flat.own for flat in optimizer.flats):
        optimizer.publish()


def is_scalar(key: str, value: torch.Tensor, shape: torch.Size) -> bool:
    """Whether a state without dims is a number that all elements share, rather than of a parameter without dims."""
    return value.dim() == 0 and (key in SCALARS or len(shape) > 0)


@torch.no_grad()
def set_state(optimizer: ShardedOptimizer, piece: nn.Parameter, key: str, value: torch.Tensor) -> None:
    """A copy of it becomes the piece's state. value: of the piece's elements, or without dims."""
    flat, begin, end, _ = optimizer.places[id(piece)]
    if key != MASTER:
        kept = value.to(piece.dtype, copy=True) if value.shape else value.clone()
        kept = kept.to(piece.device) if value.shape else kept
        if optimizer.offload is not None:
            kept = optimizer.offload.place(piece, key, kept)
        optimizer.inner.state[piece][key] = kept
    elif flat.master is not flat.own:
        piece.copy_(value)
        flat.own[begin:end].copy_(value)
