"""The norm of all gradients of a model that is cut over ranks, and clipping by it."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from pypar.tensor_parallel.shards import Shard, shards_of


def clip_grad_norm_(
    module: nn.Module, max_norm: float, norm_type: float = 2.0, error_if_nonfinite: bool = False
) -> torch.Tensor:
    """Scales the gradients so that the norm of the full model's is at most max_norm; returns the norm before.

    torch.nn.utils.clip_grad_norm_ of one process, for a model that pypar.tensor_parallel cut: shards are summed over
    the ranks of its group; parameters that stay whole, tied weights and key and value heads that several ranks hold
    count once. The result has the same bits on every rank of the group. A collective call of all of them.

    norm_type           above 0; math.inf: the largest absolute value
    error_if_nonfinite  raise RuntimeError when the norm is nan or infinite, instead of scaling by it
    Numerics            norms per tensor in the gradients' dtype, sums over tensors in float32, over ranks in float64
    Raises ValueError   norm_type not above 0; parameters that are cut over different groups
    """
    if not norm_type > 0:
        raise ValueError(f"clip_grad_norm_: norm_type must be above 0, got {norm_type}")
    shards = {id(m._parameters[name]): shard for m in module.modules() for name, shard in shards_of(m).items()}
    parameters = [p for p in module.parameters() if p.grad is not None]
    places = {shard.place for shard in shards.values()}
    if not places:
        return nn.utils.clip_grad_norm_(parameters, max_norm, norm_type, error_if_nonfinite)
    if len(places) > 1:
        names = ", ".join(sorted(place.group_name for place in places))
        raise ValueError(f"clip_grad_norm_: the parameters are cut over several groups ({names}); clip them apart")
    (place,) = places
    counted = [_counted(p.grad, shards.get(id(p)), place.rank) for p in parameters if p.grad is not None]
    device = next(module.parameters()).device
    own = get_total_norm([g for g in counted if g.numel()], norm_type).to(device, torch.float64)
    if norm_type == math.inf:
        norm = torch.ops.pypar.all_reduce(own, "max", place.group_name)
    else:
        norm = torch.ops.pypar.all_reduce(own**norm_type, "sum", place.group_name) ** (1.0 / norm_type)
    if error_if_nonfinite and not torch.isfinite(norm):
        raise RuntimeError(f"clip_grad_norm_: the norm of order {norm_type} of the gradients is {norm.item()}")
    norm = norm.float()
    clip_grads_with_norm_(parameters, max_norm, norm)
    return norm


def counted_elements(module: nn.Module) -> dict[str, bool | torch.Tensor]:
    """{name of a parameter: whether this rank counts its gradient in a norm over the ranks, or a mask of its elements
    where it counts some of them}: every element of the full model is counted on one rank.

    For a norm that is not taken from param.grad, say over ZeRO's shards. module: as pypar.tensor_parallel left it.
    """
    shards = {id(m._parameters[name]): shard for m in module.modules() for name, shard in shards_of(m).items()}
    rank = next((shard.place.rank for shard in shards.values()), 0)
    counted: dict[str, bool | torch.Tensor] = {}
    for name, parameter in module.named_parameters():
        shard = shards.get(id(parameter))
        if shard is None or not shard.cut.has_copies():
            counted[name] = shard is not None or rank == 0
            continue
        held = torch.tensor(shard.cut.first_held(rank), dtype=torch.int64, device=parameter.device)
        mask = torch.zeros_like(parameter, dtype=torch.bool)
        counted[name] = mask.index_fill_(shard.dim, held, True)
    return counted


def _counted(grad: torch.Tensor, shard: Shard | None, rank: int) -> torch.Tensor:
    """What this rank adds to the norm; every index of the full gradient is counted on one rank."""
    if shard is None:
        return grad if rank == 0 else grad.new_empty(0)
    if not shard.cut.has_copies():
        return grad
    held = torch.tensor(shard.cut.first_held(rank), dtype=torch.int64, device=grad.device)
    return grad.index_select(shard.dim, held)
