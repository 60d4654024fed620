"""State dicts of a wrapped module and its optimizer, full and sharded, under the names that the plain module has."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn

from pypar.zero.flat import FlatParameters
from pypar.zero.shard_tensor import ShardTensor
from pypar.zero.state import MASTER, is_scalar, load_full_state, pieces_of, set_state, state_names, states_of

if TYPE_CHECKING:
    from pypar.zero.wrap import Zero

State = dict[str, Any]
GROUPS = "optimizer.param_groups."

# -- full ----------------------------------------------------------------------------------------------------------


def full_state_dict(zero: Zero, dst: int | None) -> State:
    """See Zero.full_state_dict."""
    wanted = dst in (None, zero.rank)
    model: dict[str, torch.Tensor] = {}
    for flat in zero._flats:
        whole = flat.join(flat.own) if flat.world_size > 1 else flat.own
        if wanted:
            model |= {n: v.clone() for n, v in zip(flat.names, flat.views(whole), strict=True)}
    states = zero.optimizer.full_state(dst)
    if not wanted:
        return {}
    return {
        "model": _in_order(zero, model, lambda buffer: buffer.clone()),
        "optimizer": {"state": states, "param_groups": _groups(zero)},
    }


@torch.no_grad()
def load_full_state_dict(zero: Zero, state: State | None, src: int | None) -> None:
    """See Zero.load_full_state_dict."""
    here = src in (None, zero.rank)
    model = (state or {}).get("model", {})
    optimizer = (state or {}).get("optimizer", {})
    error, header = None, {}
    if here:
        error = _problem(zero, model)
        header = {name: {k: _number(v) for k, v in each.items()} for name, each in optimizer.get("state", {}).items()}
    said = [error, header, optimizer.get("param_groups")]
    if src is not None:
        dist.broadcast_object_list(said, group=zero.group, group_src=src)
    error, header, groups = said
    if error is not None:
        raise ValueError(f"pypar.Zero: {error}")
    _barrier(zero)  # nobody reads the parameters any more
    for flat in zero._flats:
        _set_weights(flat, _shard(flat, model.get, src))
    for buffer, name in ((b, n) for n, b in _buffers(zero.module)):
        if here:
            buffer.copy_(model[name])
        if src is not None:
            dist.broadcast(buffer, group=zero.group, group_src=src)
    if src is None:
        load_full_state(zero.optimizer, optimizer.get("state", {}))
    else:
        _receive_states(zero, header, optimizer.get("state", {}), src)
    _load_groups(zero, groups)
    settle(zero)


def _problem(zero: Zero, model: dict[str, torch.Tensor]) -> str | None:
    shapes = {n: s for flat in zero._flats for n, s in zip(flat.names, flat.shapes, strict=True)}
    shapes |= {n: b.shape for n, b in _buffers(zero.module)}
    for name, shape in shapes.items():
        if name not in model:
            return f"the state dict has no '{name}'"
        if model[name].shape != shape:
            return f"'{name}' is {list(model[name].shape)} in the state dict, {list(shape)} in the module"
    known = dict(_names(zero))
    unknown = sorted(set(model) - set(known) - set(shapes))
    return f"the state dict has '{unknown[0]}', which the module has not" if unknown else None


def _number(value: torch.Tensor) -> float | None:
    """Of a state without dims; None for one that travels by shards."""
    return float(value) if value.dim() == 0 else None


@torch.no_grad()
def _shard(flat: FlatParameters, find: Callable[[str], torch.Tensor | None], src: int | None) -> torch.Tensor:
    """This rank's shard of the full tensors that `find` gives by name, on every rank or on src alone; in the
    master weights' type. Collective with src."""
    begin, end = flat.layout.shard(flat.rank)
    if src is not None:
        whole = torch.zeros(flat.layout.numel, dtype=flat.master.dtype, device=flat.device)
        if src == flat.rank:
            for name, view in zip(flat.names, flat.views(whole), strict=True):
                value = find(name)
                if value is not None:
                    view.copy_(value)
        dist.broadcast(whole, group=flat.group, group_src=src)
        return whole[begin:end]
    shard = torch.zeros(end - begin, dtype=flat.master.dtype, device=flat.device)
    for piece in flat.layout.pieces(flat.rank):
        value = find(flat.names[piece.index])
        if value is not None:
            part = value.reshape(-1)[piece.start : piece.start + piece.end - piece.begin]
            shard[piece.begin - begin : piece.end - begin].copy_(part)
    return shard


@torch.no_grad()
def _set_weights(flat: FlatParameters, shard: torch.Tensor) -> None:
    flat.master.copy_(shard)
    if flat.own is not flat.master:
        flat.own.copy_(shard)


def _receive_states(zero: Zero, header: State, states: State, src: int) -> None:
    for flat in zero.optimizer.flats:
        keys = sorted({key for name in flat.names for key in header.get(name, {})})
        for key in keys:
            having = [name for name in flat.names if key in header.get(name, {})]
            shapes = dict(zip(flat.names, flat.shapes, strict=True))
            travels = [n for n in having if header[n][key] is None or not is_scalar(key, torch.zeros(()), shapes[n])]
            shard = _shard(flat, lambda name, k=key: states.get(name, {}).get(k), src) if travels else None  # type: ignore[misc]
            for piece, (_, begin, end, _) in pieces_of(zero.optimizer, flat):
                name = zero.optimizer.names[id(piece)]
                if name in travels:
                    assert shard is not None
                    set_state(zero.optimizer, piece, key, shard[begin:end])
                elif name in having:
                    set_state(zero.optimizer, piece, key, torch.tensor(header[name][key]))


# -- sharded -------------------------------------------------------------------------------------------------------


def sharded_state_dict(zero: Zero) -> State:
    """See Zero.sharded_state_dict."""
    model: dict[str, torch.Tensor] = {}
    states: dict[str, dict[str, torch.Tensor]] = {}
    for flat in zero._flats:
        model |= _sharded(flat, flat.own)
    for flat in zero.optimizer.flats:
        shapes = dict(zip(flat.names, flat.shapes, strict=True))
        mine = pieces_of(zero.optimizer, flat)
        for key, scalar, having in state_names(zero.optimizer, flat, mine):
            for name in having:
                parts = []
                for piece, (_, _, _, start) in mine:
                    value = states_of(zero.optimizer, piece).get(key)
                    if zero.optimizer.names[id(piece)] == name and value is not None:
                        parts.append((start, value))
                if not scalar:
                    dtype = flat.master.dtype
                    states.setdefault(name, {})[key] = ShardTensor.of_flat(shapes[name], dtype, parts)
                elif parts:
                    states.setdefault(name, {})[key] = parts[0][1]
    return {
        "model": _in_order(zero, model, lambda buffer: buffer),
        "optimizer": {"state": states, "param_groups": _groups(zero)},
    }


def _sharded(flat: FlatParameters, shard: torch.Tensor) -> dict[str, torch.Tensor]:
    first, _ = flat.layout.shard(flat.rank)
    parts: dict[int, list[tuple[int, torch.Tensor]]] = {index: [] for index in range(len(flat.names))}
    for piece in flat.layout.pieces(flat.rank):
        parts[piece.index].append((piece.start, shard[piece.begin - first : piece.end - first]))
    return {
        name: ShardTensor.of_flat(shape, shard.dtype, parts[index])
        for index, (name, shape) in enumerate(zip(flat.names, flat.shapes, strict=True))
    }


def save_sharded(zero: Zero, folder: str | os.PathLike[str]) -> None:
    """See Zero.save_sharded."""
    replicas = zero.replicate_group
    if replicas is None or dist.get_rank(replicas) == 0:
        dcp.save(sharded_state_dict(zero), checkpoint_id=folder, process_group=zero.group)
    if replicas is not None:
        dist.barrier(group=replicas)


@torch.no_grad()
def load_sharded(zero: Zero, folder: str | os.PathLike[str]) -> None:
    """See Zero.load_sharded."""
    reader = dcp.FileSystemReader(folder)
    stored: dict[str, Any] = dict(reader.read_metadata().state_dict_metadata)
    wanted: State = {f"model.{name}": buffer for name, buffer in _buffers(zero.module)}
    for flat in zero._flats:
        for name, tensor in _sharded(flat, flat.master).items():
            precise = f"optimizer.state.{name}.{MASTER}"
            wanted[precise if precise in stored else f"model.{name}"] = tensor
    scalars: dict[str, torch.Tensor] = {}
    for flat in zero.optimizer.flats:
        parts: dict[str, tuple[torch.Size, list[tuple[int, torch.Tensor]]]] = {}
        shapes = dict(zip(flat.names, flat.shapes, strict=True))
        for piece, (_, _, _, start) in pieces_of(zero.optimizer, flat):
            name = zero.optimizer.names[id(piece)]
            prefix = f"optimizer.state.{name}."
            for full in [n for n in stored if n.startswith(prefix) and n != prefix + MASTER]:
                key = full.removeprefix(prefix)
                if is_scalar(key, torch.empty(tuple(stored[full].size), device="meta"), shapes[name]):
                    scalars.setdefault(full, torch.zeros(tuple(stored[full].size)))
                    zero.optimizer.inner.state[piece][key] = scalars[full]
                else:
                    set_state(zero.optimizer, piece, key, torch.zeros_like(piece))
                    parts.setdefault(full, (shapes[name], []))[1].append(
                        (start, zero.optimizer.inner.state[piece][key])
                    )
        wanted |= {full: ShardTensor.of_flat(shape, held[0][1].dtype, held) for full, (shape, held) in parts.items()}
    settings = [name for name in stored if name.startswith(GROUPS)]
    missing = sorted(name for name in wanted if name not in stored)
    if missing:
        raise ValueError(f"pypar.Zero: the checkpoint {os.fspath(folder)} has no '{missing[0]}'")
    _barrier(zero)  # nobody reads the parameters any more
    wanted |= scalars
    wanted |= {n: torch.zeros(stored[n].size) if hasattr(stored[n], "size") else None for n in settings}
    dcp.load(wanted, storage_reader=reader, process_group=zero.group)
    for flat in zero._flats:
        if flat.own is not flat.master:
            flat.own.copy_(flat.master)
    for piece in [p for group in zero.optimizer.param_groups for p in group["params"]]:
        state = zero.optimizer.inner.state[piece]
        state.update({k: v.clone() for k, v in state.items() if v.dim() == 0})  # each piece counts by itself
    groups: dict[int, State] = {}
    for name in settings:
        number, _, key = name.removeprefix(GROUPS).partition(".")
        groups.setdefault(int(number), {})[key] = wanted[name]
    _load_groups(zero, [groups[number] for number in sorted(groups)] or None)
    settle(zero)


# -- shared --------------------------------------------------------------------------------------------------------


def _names(zero: Zero) -> Iterator[tuple[str, str]]:
    """(name, the name that its unit has it under), tied parameters under each of their names."""
    first: dict[int, str] = {id(p): n for flat in zero._flats for n, p in zip(flat.names, flat.parameters, strict=True)}
    for name, parameter in zero.module.named_parameters(remove_duplicate=False):
        yield name, first[id(parameter)]


def _in_order(
    zero: Zero, parameters: dict[str, torch.Tensor], take: Callable[[torch.Tensor], torch.Tensor]
) -> dict[str, torch.Tensor]:
    """With second names of tied parameters, and buffers."""
    found = {name: parameters[first] for name, first in _names(zero)}
    return found | {name: take(buffer) for name, buffer in _buffers(zero.module)}


def _buffers(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Those that a state dict has."""
    for prefix, each in module.named_modules(remove_duplicate=False):
        for name, buffer in each._buffers.items():
            if buffer is not None and name not in each._non_persistent_buffers_set:
                yield (f"{prefix}.{name}" if prefix else name), buffer.detach()


def _groups(zero: Zero) -> list[State]:
    """The optimizer's settings; "params" are names."""
    return [
        {**{k: v for k, v in group.items() if k != "params"}, "params": names}
        for group, names in zip(zero.optimizer.param_groups, zero.optimizer.group_names, strict=True)
    ]


def _load_groups(zero: Zero, groups: list[State] | None) -> None:
    if groups is None:
        return
    found = [sorted(group["params"]) for group in groups]
    wanted = [sorted(names) for names in zero.optimizer.group_names]
    if found != wanted:
        raise ValueError(
            f"pypar.Zero: the state dict's parameter groups ({len(found)}) are not those of this optimizer "
            f"({len(wanted)}); build it with the same groups, or leave 'param_groups' out"
        )
    for group, given in zip(zero.optimizer.param_groups, groups, strict=True):
        group.update({k: v for k, v in given.items() if k != "params"})


def _barrier(zero: Zero) -> None:
    if zero.world_size > 1:
        dist.barrier(group=zero.group)


def settle(zero: Zero) -> None:
    """After the shards have changed: everybody's newest values. Collective."""
    _barrier(zero)
    for flat in zero._flats:
        flat.publish()
    zero._gatherer.finish()
