"""Which parameters of a module are shards: written where they are cut, read by loading and by gathering."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.distributed_c10d import _resolve_process_group

from pypar.ops.library import is_layout, name_of
from pypar.tensor_parallel.cut import Cut

Group = dist.ProcessGroup | DeviceMesh | str | None
_ATTRIBUTE = "_pypar_shards"


@dataclass(frozen=True)
class Place:
    """A group, as what a module can keep: it pickles and copies, which a process group doesn't."""

    group_name: str
    rank: int
    world_size: int
    determinism: str = "run"  # of the sums over the group


def place_of(group: Group | Place, determinism: str | None = None) -> Place:
    """group: a process group, its name, a DeviceMesh of one dim, or None for the world."""
    if determinism is not None:
        is_layout(determinism)  # refuses other names
        return replace(place_of(group), determinism=determinism)
    if isinstance(group, Place):
        return group
    if isinstance(group, DeviceMesh):
        group = group.get_group()
    name = name_of(group)
    process_group = _resolve_process_group(dist.GroupName(name))
    return Place(name, process_group.rank(), process_group.size())


@dataclass(frozen=True)
class Shard:
    """A parameter that holds rank `place.rank`'s part of `dim`, cut by `cut`."""

    dim: int
    cut: Cut
    place: Place

    def take(self, full: torch.Tensor) -> torch.Tensor:
        return self.cut.take(full, self.place.rank, self.dim)


def shards_of(module: nn.Module) -> dict[str, Shard]:
    """{name of a parameter of this very module: its shard}"""
    return getattr(module, _ATTRIBUTE, {})


def cut_parameter(module: nn.Module, name: str, shard: Shard) -> None:
    """Puts this rank's part in the place of the full parameter, and makes load_state_dict cut it the same way."""
    full = module._parameters[name]
    if full is None:
        return
    if full.shape[shard.dim] != shard.cut.full:
        raise ValueError(
            f"{type(module).__name__}.{name} is {tuple(full.shape)}, but a cut of {shard.cut.full} was asked for in "
            f"dim {shard.dim}"
        )
    part = shard.take(full.detach()).clone(memory_format=torch.contiguous_format)
    module._parameters[name] = nn.Parameter(part, requires_grad=full.requires_grad)
    if _ATTRIBUTE not in module.__dict__:
        module.__dict__[_ATTRIBUTE] = {}
        module.register_load_state_dict_pre_hook(_cut_what_is_loaded)
    module.__dict__[_ATTRIBUTE][name] = shard


def _cut_what_is_loaded(
    module: nn.Module,
    state_dict: dict[str, Any],
    prefix: str,
    local_metadata: Any,
    strict: bool,
    missing_keys: list[str],
    unexpected_keys: list[str],
    error_msgs: list[str],
) -> None:
    """Full tensors are cut, shards of the same cut pass, anything else is an error that says both shapes."""
    for name, shard in shards_of(module).items():
        given = state_dict.get(prefix + name)
        here = module._parameters[name]
        if given is None or here is None or given.shape == here.shape:
            continue
        full = list(here.shape)
        full[shard.dim] = shard.cut.full
        if list(given.shape) == full:
            state_dict[prefix + name] = shard.take(given)
            continue
        error_msgs.append(
            f"{prefix + name} is {tuple(given.shape)} in the state dict; rank {shard.place.rank} of "
            f"{shard.place.world_size} takes the full {tuple(full)} or its own shard {tuple(here.shape)}"
        )
