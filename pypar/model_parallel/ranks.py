"""One device per rank: a placement as the cut of a pipeline."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from pypar.model_parallel.devices import Budget, is_budget, parse_size
from pypar.model_parallel.plan import Placement, Unit, assign, bytes_of
from pypar.model_parallel.rules import resolve, tensors_of
from pypar.placement import Part, cut


def place_on_ranks(
    module: nn.Module,
    world_size: int,
    device_map: str | Mapping[Any, Any],
    max_memory: Mapping[Any, Any] | None,
    costs: Mapping[str, float] | None,
    copies: int,
) -> tuple[Placement, list[int]]:
    """(placement, number of blocks per rank). Devices are ranks: 1 or 'rank:1'. What stands before the blocks goes
    with rank 0, what stands behind them with the last. Raises ValueError as `place` does, and for a map whose blocks
    aren't in the order of the ranks."""
    if isinstance(device_map, Mapping) and _is_rank_budget(device_map):
        max_memory, device_map = device_map, "auto"
    if not isinstance(device_map, Mapping) and device_map != "auto":
        raise ValueError(f"device_map={device_map!r}: with group=, give 'auto', {{name: rank}} or {{rank: bytes}}")

    def name_of(rank: Any) -> str:
        number = str(rank).removeprefix("rank:")
        if isinstance(rank, bool) or not number.isdecimal() or int(number) >= world_size:
            raise ValueError(f"unknown rank {rank!r}: the group has 0 to {world_size - 1}")
        return f"rank:{int(number)}"

    budget: Budget = {f"rank:{r}": None for r in range(world_size)}
    budget.update({name_of(r): None if s is None else parse_size(s) for r, s in (max_memory or {}).items()})
    parts = cut(module, world_size).parts
    if costs is not None:
        unknown = [part.name for part in parts if part.name not in costs]
        if unknown:
            raise ValueError(f"costs: none for '{unknown[0]}'")
    tensors = tensors_of(module)
    first = next(i for i, part in enumerate(parts) if part.is_block)
    last = max(i for i, part in enumerate(parts) if part.is_block)
    groups = [parts[: first + 1], *([part] for part in parts[first + 1 : last]), parts[last:]]
    if first == last:
        groups = [parts]
    units = [_unit(group, costs, copies) for group in groups]
    if isinstance(device_map, Mapping):
        chosen = resolve(module, device_map, name_of, ties_cross=True)
        for unit, group in zip(units, groups, strict=True):
            unit.device = _rank_of(group, chosen)
        _check_order(units, world_size)
        for rank, limit in budget.items():
            used = sum(u.num_bytes for u in units if u.device == rank)
            if limit is not None and used > limit:
                raise ValueError(
                    f"device_map puts {used} bytes on {rank}, which may hold {limit}: {used - limit} are missing"
                )
    else:
        assign(units, budget, may_be_empty=False, why="; every rank gets a block")
    counts = [
        sum(part.is_block for u, group in zip(units, groups, strict=True) if u.device == rank for part in group)
        for rank in budget
    ]
    device_of = {name: unit.device for unit in units for name in unit.names}
    found = {name: device_of[p] for name in tensors for p in device_of if name == p or name.startswith(f"{p}.")}
    return Placement(found, units, budget, device_of), counts


def _is_rank_budget(device_map: Mapping[Any, Any]) -> bool:
    ranks = {key: value for key, value in device_map.items() if isinstance(key, int) or str(key).startswith("rank:")}
    return len(ranks) == len(device_map) and is_budget({index: size for index, size in enumerate(ranks.values())})


def _unit(group: list[Part], costs: Mapping[str, float] | None, copies: int) -> Unit:
    tensors = {id(t): t for part in group for t in tensors_of(part.module).values()}
    cost = sum(part.cost if costs is None else costs[part.name] for part in group)
    return Unit([p.name for p in group], list(tensors.values()), cost, bytes_of(tensors.values(), copies))


def _rank_of(group: list[Part], chosen: dict[str, str]) -> str:
    found: dict[str, str] = {}
    for part in group:
        for name, rank in chosen.items():
            if name.startswith(f"{part.name}."):
                found.setdefault(rank, part.name)
    if len(found) != 1:
        (one, first), (other, second) = list(found.items())[:2]
        raise ValueError(
            f"device_map puts '{first}' on {one} and '{second}' on {other}: with one device per rank a block lies on "
            "one rank, what stands before the blocks with the first of them, what stands behind with the last"
        )
    return next(iter(found))


def _check_order(units: Iterable[Unit], world_size: int) -> None:
    order = [int(unit.device.removeprefix("rank:")) for unit in units]
    if order != sorted(order) or set(order) != set(range(world_size)):
        raise ValueError(
            f"device_map gives the blocks to ranks {order}: a group of {world_size} needs all of them, in this order"
        )
