"""What goes to which device: units that aren't cut, budgets, and the table of the result. Moves nothing."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from pypar.model_parallel.devices import Budget, Device, budget_of, device_name, format_size, is_budget
from pypar.model_parallel.rules import resolve, tensors_of
from pypar.placement import contiguous, cost_of


@dataclass
class Unit:
    """What the planner keeps on one device: a module, a parameter of its own on a module that is cut, or several of
    them that are tied. cost: of its matmuls per token, or as measured. num_bytes: tied tensors count once."""

    names: list[str]
    tensors: list[torch.Tensor]
    cost: float
    num_bytes: int
    device: str = ""


@dataclass
class Placement:
    """tensors: {name of a parameter or buffer: device}. units: with their costs and bytes. budget: of the devices."""

    tensors: dict[str, str]
    units: list[Unit]
    budget: Budget
    device_map: dict[str, str] = field(default_factory=dict)

    def bytes_on(self, device: str) -> int:
        return sum(u.num_bytes for u in self.units if u.device == device)

    def cost_on(self, device: str) -> float:
        return sum(u.cost for u in self.units if u.device == device)

    def table(self) -> str:
        """A line per device: bytes, of how many, cost and its share, what lies there."""
        total = sum(u.cost for u in self.units) or 1
        rows = [("device", "bytes", "budget", "cost", "share", "holds")]
        for device, limit in self.budget.items():
            cost = self.cost_on(device)
            names = [name for u in self.units if u.device == device for name in u.names]
            budget = "-" if limit is None else format_size(limit)
            share = f"{100 * cost / total:.0f} %"
            text = f"{cost:,}" if isinstance(cost, int) else f"{cost:.3g}"
            rows.append((device, format_size(self.bytes_on(device)), budget, text, share, _short(names)))
        widths = [max(len(row[i]) for row in rows) for i in range(5)]
        return "\n".join(
            "  ".join([row[0].ljust(widths[0]), *(row[i].rjust(widths[i]) for i in range(1, 5)), row[5]])
            for row in rows
        )


def place(
    module: nn.Module,
    device_map: str | Mapping[Any, Any] = "auto",
    *,
    max_memory: Mapping[Device, int | str | None] | None = None,
    no_split: Iterable[str] | None = None,
    costs: Mapping[str, float] | None = None,
    copies: int = 1,
) -> Placement:
    """The placement that ModelParallel would make, with its arguments; moves nothing, and takes a model on 'meta'.

    Raises ValueError: a map that doesn't fit the model, or a model that doesn't fit the budget (how much is missing).
    """
    if copies < 1:
        raise ValueError(f"copies={copies}: a weight is there once at least")
    if isinstance(device_map, str) and device_map != "auto":
        device_map = {"": device_map}
    if not isinstance(device_map, (str, Mapping)) or not device_map:
        raise ValueError(f"device_map={device_map!r}: give 'auto', {{name: device}} or a budget {{device: bytes}}")
    if isinstance(device_map, Mapping) and is_budget(device_map):
        if max_memory is not None:
            raise ValueError("device_map is a budget {device: bytes} already; leave max_memory out")
        max_memory, device_map = device_map, "auto"
    units = units_of(module, no_split, costs, copies)
    if isinstance(device_map, str):
        budget = budget_of(max_memory)
        assign(units, budget)
        device_of = {id(t): unit.device for unit in units for t in unit.tensors}
        tensors = {name: device_of[id(t)] for name, t in tensors_of(module).items()}
    else:
        tensors = resolve(module, device_map, device_name)
        units = _by_device(module, tensors, units, copies)
        budget = dict.fromkeys(dict.fromkeys(tensors.values()))
        limits = {} if max_memory is None else budget_of(max_memory)
        budget.update({device: limits.get(device) for device in budget})
    found = Placement(tensors, units, budget, map_of(module, tensors))
    if not isinstance(device_map, str):
        _check_budget(found)
    return found


# -- units ---------------------------------------------------------------------------------------------------------


def whole_modules(module: nn.Module, no_split: Iterable[str] | None = None) -> Iterator[tuple[str, Any]]:
    """(name, module or tensor) of what isn't cut, in order.

    no_split  names of classes that stay whole, everything else may be cut down to its last module; None: entries of
              nn.ModuleLists and nn.Sequentials, modules that contain no such list, and what a Hugging Face model names
              in _no_split_modules
    """
    known = set((getattr(module, "_no_split_modules", None) or ()) if no_split is None else no_split)

    def is_list(each: nn.Module) -> bool:
        return isinstance(each, (nn.ModuleList, nn.Sequential, nn.ModuleDict))

    def has_tensors(each: nn.Module) -> bool:
        return any(True for _ in each.parameters()) or any(True for _ in each.buffers())

    def stays_whole(each: nn.Module, in_list: bool) -> bool:
        if type(each).__name__ in known or not any(has_tensors(child) for child in each.children()):
            return True
        if no_split is not None or each is module or is_list(each):
            return False
        return in_list or not any(is_list(inner) and has_tensors(inner) for inner in each.modules())

    def visit(each: nn.Module, name: str, in_list: bool) -> Iterator[tuple[str, Any]]:
        if not has_tensors(each):
            return
        if stays_whole(each, in_list):
            yield name, each
            return
        prefix = f"{name}." if name else ""
        for tensor_name, tensor in (*each.named_parameters(recurse=False), *each.named_buffers(recurse=False)):
            yield prefix + tensor_name, tensor
        for child_name, child in each.named_children():
            yield from visit(child, prefix + child_name, is_list(each))

    yield from visit(module, "", False)


def units_of(
    module: nn.Module, no_split: Iterable[str] | None, costs: Mapping[str, float] | None, copies: int
) -> list[Unit]:
    """In the order in which they run, as far as registration says: modules with buffers alone (rotary tables) come
    first, the output embeddings last. Tied ones are one unit, where the first of them stands."""
    found = list(whole_modules(module, no_split))
    if costs is not None:
        unknown = [name for name, each in found if name not in costs and isinstance(each, nn.Module)]
        if unknown:
            raise ValueError(f"costs: none for '{unknown[0]}'; measure the model with the same no_split")
    try:
        head = module.get_output_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        head = None

    def rank_in_order(each: Any) -> int:
        only_buffers = isinstance(each, nn.Module) and not any(True for _ in each.parameters())
        return 2 if each is head and head is not None else 0 if only_buffers else 1

    units: list[Unit] = []
    owner: dict[int, Unit] = {}
    for name, each in sorted(found, key=lambda item: rank_in_order(item[1])):
        tensors = list(tensors_of(each).values()) if isinstance(each, nn.Module) else [each]
        default = cost_of(each) if isinstance(each, nn.Module) else 0
        cost = default if costs is None else costs.get(name, 0.0)
        new = {id(t): t for t in tensors if id(t) not in owner}
        ties = list({id(owner[id(t)]): owner[id(t)] for t in tensors if id(t) in owner}.values())
        unit = ties[0] if ties else Unit([], [], 0, 0)
        for other in ties[1:]:  # it ties units that were apart
            unit = _merged(unit, other, units, owner)
        if not ties:
            units.append(unit)
        unit.names.append(name)
        unit.tensors += new.values()
        unit.cost += cost
        unit.num_bytes += bytes_of(new.values(), copies)
        owner.update(dict.fromkeys(new, unit))
    return units


def _merged(one: Unit, other: Unit, units: list[Unit], owner: dict[int, Unit]) -> Unit:
    first, second = (one, other) if _index(units, one) < _index(units, other) else (other, one)
    del units[_index(units, second)]
    first.names += second.names
    first.tensors += second.tensors
    first.cost += second.cost
    first.num_bytes += second.num_bytes
    owner.update({id(t): first for t in second.tensors})
    return first


def _index(units: list[Unit], unit: Unit) -> int:
    return next(i for i, each in enumerate(units) if each is unit)


def bytes_of(tensors: Iterable[torch.Tensor], copies: int) -> int:
    return sum(t.numel() * t.element_size() * (copies if t.requires_grad else 1) for t in tensors)


# -- devices -------------------------------------------------------------------------------------------------------


def assign(units: list[Unit], budget: Budget, may_be_empty: bool = True, why: str = "") -> None:
    """Units in order, devices in order, the dearest device as cheap as the budget allows; the CPU only takes what
    accelerators can't hold. Raises ValueError, which says how much is missing."""
    devices = list(budget)
    cpus = [device.split(":")[0] == "cpu" for device in devices]
    last_resort = [is_cpu and not all(cpus) for is_cpu in cpus]
    sizes = [unit.num_bytes for unit in units]
    starts, missing = contiguous(
        [unit.cost for unit in units],
        len(devices),
        sizes=sizes,
        limits=list(budget.values()),
        is_last_resort=last_resort,
        may_be_empty=may_be_empty,
    )
    for device, (begin, end) in zip(devices, pairwise([*starts, len(units)]), strict=True):
        for unit in units[begin:end]:
            unit.device = device
    if not missing:
        return
    room = sum(limit for limit in budget.values() if limit is not None)
    total, largest = sum(sizes), max(units, key=lambda unit: unit.num_bytes)
    have = ", ".join(f"{d} {format_size(limit)}" for d, limit in budget.items() if limit is not None)
    if total > room and None not in budget.values():
        reason = f"the model has {format_size(total)}, the devices hold {format_size(room)}"
    else:
        reason = (
            f"the model's {format_size(total)} can't be cut to fit: its largest unit '{largest.names[0]}' has "
            f"{format_size(largest.num_bytes)}; smaller ones come with no_split=[]"
        )
    raise ValueError(f"the model doesn't fit: {format_size(missing)} are missing ({have}); {reason}{why}")


def _check_budget(placement: Placement) -> None:
    for device, limit in placement.budget.items():
        used = placement.bytes_on(device)
        if limit is not None and used > limit:
            raise ValueError(
                f"device_map puts {format_size(used)} on {device}, which may hold {format_size(limit)}: "
                f"{format_size(used - limit)} are missing"
            )


def _by_device(module: nn.Module, tensors: dict[str, str], units: list[Unit], copies: int) -> list[Unit]:
    """The units, with those that the map cuts in pieces of one device each."""
    all_tensors = tensors_of(module)
    device_of = {id(t): tensors[name] for name, t in all_tensors.items()}
    modules = dict(module.named_modules(remove_duplicate=False))
    found: list[Unit] = []
    for unit in units:
        devices = {device_of[id(t)] for t in unit.tensors}
        if len(devices) == 1:
            unit.device = devices.pop()
            found.append(unit)
            continue
        seen: set[int] = set()
        for name in unit.names:
            inside = {n: tensors[n] for n in all_tensors if not name or n == name or n.startswith(f"{name}.")}
            prefix = f"{name}." if name else ""
            if name not in modules:
                pieces = {name: tensors[name]}
            else:
                local = map_of(modules[name], {n.removeprefix(prefix): device for n, device in inside.items()})
                pieces = {f"{prefix}{piece}" if piece else name: device for piece, device in local.items()}
            for piece, device in pieces.items():
                new = {
                    id(all_tensors[n]): all_tensors[n]
                    for n in inside
                    if (not piece or n == piece or n.startswith(f"{piece}.")) and id(all_tensors[n]) not in seen
                }
                seen.update(new)
                cost = cost_of(modules[piece]) if piece in modules else 0
                found.append(Unit([piece], list(new.values()), cost, bytes_of(new.values(), copies), device))
    return found


def map_of(module: nn.Module, tensors: Mapping[str, str]) -> dict[str, str]:
    """{name: device} of the largest modules that lie on one device, and of parameters beside them; as device_map it
    gives the same placement again."""

    def visit(each: nn.Module, name: str) -> Iterator[tuple[str, str]]:
        prefix = f"{name}." if name else ""
        here = {tensors[prefix + n] for n in tensors_of(each)}
        if len(here) == 1:
            yield name, here.pop()
            return
        for tensor_name in (*dict(each.named_parameters(recurse=False)), *dict(each.named_buffers(recurse=False))):
            yield prefix + tensor_name, tensors[prefix + tensor_name]
        for child_name, child in each._modules.items():
            if child is not None:
                yield from visit(child, prefix + child_name)

    return dict(visit(module, ""))


def _short(names: Sequence[str]) -> str:
    """Blocks in a row as 'layers.0 ... layers.5'."""
    runs: list[list[str]] = []
    for name in names:
        stem, _, index = name.rpartition(".")
        last = runs[-1][-1].rpartition(".") if runs else ("", "", "")
        if index.isdecimal() and last[2].isdecimal() and stem == last[0] and int(index) == int(last[2]) + 1:
            runs[-1].append(name)
        else:
            runs.append([name])
    return ", ".join(run[0] if len(run) == 1 else f"{run[0]} ... {run[-1]}" for run in runs) or "-"
