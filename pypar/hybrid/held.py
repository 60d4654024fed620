"""What this rank holds of a model and its optimizer, as boxes of full tensors under the names of the full model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from pypar.data_parallel import DataParallel
from pypar.hybrid.model import HybridModel
from pypar.hybrid.regions import Box, in_full
from pypar.pipeline_parallel import Pipeline
from pypar.tensor_parallel.shards import Shard
from pypar.tensor_parallel.state import shards_by_name
from pypar.zero import ShardedOptimizer, ShardTensor, Zero
from pypar.zero.checkpoint import settle
from pypar.zero.flat import FlatParameters
from pypar.zero.shard_tensor import boxes_of_flat
from pypar.zero.state import MASTER, SCALARS, set_state

Tensors = dict[str, torch.Tensor]


@dataclass
class Place:
    """A parameter of this rank. name: the full model's, of a tied weight the first. shape: here, cut by `shard`."""

    name: str
    shape: torch.Size
    shard: Shard | None

    @property
    def full_shape(self) -> torch.Size:
        if self.shard is None:
            return self.shape
        return torch.Size([self.shard.cut.full if d == self.shard.dim else n for d, n in enumerate(self.shape)])

    def tensor(self, data: torch.Tensor, start: int | None = None) -> ShardTensor:
        """data: of the whole parameter here, or, flat, of its elements from `start` on."""
        data = data.detach()
        held = [((0,) * data.dim(), data)] if start is None else boxes_of_flat(self.shape, start, data)
        if self.shard is not None:
            dim, ranges = self.shard.dim, self.shard.cut.ranges[self.shard.place.rank]
            held = [
                (box.offsets, view.narrow(dim, begin, size))
                for offsets, view in held
                for box, begin, size in in_full(Box(offsets, tuple(view.shape)), dim, ranges)
            ]
        return ShardTensor(self.full_shape, data.dtype, [each for each in held if each[1].numel()])


@dataclass
class States:
    """Of an optimizer. tensors: {"optimizer.state.NAME.KEY": parts}; keys: {name: keys of these}; scalars: {name: {key:
    number that all elements share}}; groups: settings, with names as "params"."""

    tensors: Tensors
    keys: dict[str, list[str]]
    scalars: dict[str, dict[str, Any]]
    groups: list[dict[str, Any]]


class Holding:
    """Of a model, whole or shared out by whatever, and of its optimizer. Raises ValueError for one of another model."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer | None):
        self.module, self.zero, pipeline = _unwrapped(model)
        inner = getattr(optimizer, "inner", optimizer)
        self.optimizer = optimizer if isinstance(optimizer, ShardedOptimizer) else inner
        if self.zero is not None and optimizer is not None and self.optimizer is not self.zero.optimizer:
            raise ValueError("the optimizer is not the one that ZeRO steps; give model.optimizer")
        names = {id(p): name for name, p in self.module.named_parameters()}
        if pipeline is not None:  # of a tied weight this rank may know the second name only
            names |= {id(t.parameter): t.name for t in pipeline._tied if t.parameter is not None}
        shards = shards_by_name(self.module)
        every = dict(self.module.named_parameters(remove_duplicate=False))
        shard_of = {id(every[name]): shard for name, shard in shards.items() if name in every}
        flats = [] if self.zero is None else self.zero._flats
        shapes = {id(p): s for flat in flats for p, s in zip(flat.parameters, flat.shapes, strict=True)}
        self.places = {
            id(p): Place(names[id(p)], shapes.get(id(p), p.shape), shard_of.get(id(p)))
            for p in self.module.parameters()
        }

    def shapes(self) -> dict[str, torch.Size]:
        """{name of a parameter or buffer that this rank has a part of: its full shape}"""
        found = {place.name: place.full_shape for place in self.places.values()}
        return found | {name: buffer.shape for name, buffer in self.buffers()}

    def buffers(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Those that a state dict has."""
        every = dict(self.module.named_buffers(remove_duplicate=False))
        for name in _persistent(self.module):
            yield name, every[name].detach()

    # -- saving --------------------------------------------------------------------------------------------------------

    def weights(self) -> Tensors:
        """{"model.NAME": parts}, and float32 masters."""
        found: Tensors = {f"model.{name}": _whole(buffer) for name, buffer in self.buffers()}
        if self.zero is None:
            for parameter in self.module.parameters():
                place = self.places[id(parameter)]
                found[f"model.{place.name}"] = place.tensor(parameter)
            return found
        for flat in self.zero._flats:
            for place, begin, end, start in self._pieces(flat):
                found[f"model.{place.name}"] = place.tensor(flat.own[begin:end], start)
                if flat.master is not flat.own:
                    found[_state(place.name, MASTER)] = place.tensor(flat.master[begin:end], start)
        return found

    def _pieces(self, flat: FlatParameters) -> Iterator[tuple[Place, int, int, int]]:
        first, _ = flat.layout.shard(flat.rank)
        for piece in flat.layout.pieces(flat.rank):
            place = self.places[id(flat.parameters[piece.index])]
            yield place, piece.begin - first, piece.end - first, piece.start

    def states(self) -> States:
        found = States({}, {}, {}, self.groups())
        for place, parameter, start in self._stepped():
            assert self.optimizer is not None
            for key, value in self.optimizer.state.get(parameter, {}).items():
                if not isinstance(value, torch.Tensor) or _is_number(key, value, place):
                    value = value.detach().cpu().clone() if isinstance(value, torch.Tensor) else value
                    found.scalars.setdefault(place.name, {})[key] = value
                    continue
                if value.shape == parameter.shape:
                    tensor: torch.Tensor = place.tensor(value, start)
                elif start is None and place.shard is None:
                    tensor = _whole(value)
                else:
                    raise ValueError(
                        f"state {key} of '{place.name}' is {list(value.shape)}, neither a number nor of the "
                        f"parameter's shape {list(parameter.shape)}: it can't be saved from a part of a parameter"
                    )
                found.tensors[_state(place.name, key)] = tensor
                found.keys.setdefault(place.name, []).append(key)
        return found

    def _stepped(self) -> Iterator[tuple[Place, nn.Parameter, int | None]]:
        """(place, what the optimizer steps, where that begins in the parameter or None for the whole)"""
        optimizer = self.optimizer
        if optimizer is None:
            return
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if isinstance(optimizer, ShardedOptimizer):
                    flat, _, _, start = optimizer.places[id(parameter)]
                    index = flat.names.index(optimizer.names[id(parameter)])
                    yield self.places[id(flat.parameters[index])], parameter, start
                elif id(parameter) not in self.places:
                    raise ValueError(f"the optimizer steps a parameter {list(parameter.shape)} that is not the model's")
                else:
                    yield self.places[id(parameter)], parameter, None

    def groups(self) -> list[dict[str, Any]]:
        optimizer = self.optimizer
        if optimizer is None:
            return []
        if isinstance(optimizer, ShardedOptimizer):
            pairs = [(n, p) for flat in optimizer.flats for n, p in zip(flat.names, flat.parameters, strict=True)]
            first = {name: self.places[id(p)].name for name, p in pairs}
            names = [[first[name] for name in group] for group in optimizer.group_names]
        else:
            groups = optimizer.param_groups
            names = [[self.places[id(p)].name for p in g["params"] if id(p) in self.places] for g in groups]
        return [
            {**{k: v for k, v in group.items() if k != "params"}, "params": mine}
            for group, mine in zip(optimizer.param_groups, names, strict=True)
        ]

    # -- loading -------------------------------------------------------------------------------------------------------

    def wanted_weights(self, stored: Mapping[str, Any]) -> Tensors:
        """{name in the checkpoint: parts of this rank's memory, to be filled}; float32 ones from masters where there
        are."""
        found: Tensors = {f"model.{name}": _whole(buffer) for name, buffer in self.buffers() if buffer.numel()}

        def source(name: str, dtype: torch.dtype) -> str:
            precise = _state(name, MASTER)
            return precise if precise in stored and dtype in (torch.float32, torch.float64) else f"model.{name}"

        if self.zero is None:
            for parameter in self.module.parameters():
                place = self.places[id(parameter)]
                found[source(place.name, parameter.dtype)] = place.tensor(parameter)
            return found
        for flat in self.zero._flats:
            for place, begin, end, start in self._pieces(flat):
                found[source(place.name, flat.master.dtype)] = place.tensor(flat.master[begin:end], start)
        return found

    @torch.no_grad()
    def wanted_states(self, keys: Mapping[str, list[str]], stored: Mapping[str, Any]) -> Tensors:
        """Fresh states, to be filled."""
        found: Tensors = {}
        for place, parameter, start in self._stepped():
            assert self.optimizer is not None
            state = self.optimizer.state[parameter]
            state.clear()
            for key in keys.get(place.name, ()):
                full = _state(place.name, key)
                if isinstance(self.optimizer, ShardedOptimizer):
                    set_state(self.optimizer, parameter, key, torch.zeros_like(parameter))
                    found[full] = place.tensor(state[key], start)
                    continue
                dtype, shape = stored[full].properties.dtype, torch.Size(stored[full].size)
                if shape == place.full_shape:
                    state[key] = torch.zeros_like(parameter, dtype=dtype)
                    found[full] = place.tensor(state[key])
                elif place.shard is None:
                    state[key] = torch.zeros(shape, dtype=dtype, device=parameter.device)
                    found[full] = _whole(state[key])
                else:
                    raise ValueError(f"state {key} of '{place.name}' is {list(shape)}, which can't be cut as it is")
        return found

    def take_scalars(self, scalars: Mapping[str, Mapping[str, Any]], groups: list[dict[str, Any]]) -> None:
        assert self.optimizer is not None
        for group, given in zip(self.optimizer.param_groups, groups, strict=True):
            group.update({k: _copied(v) for k, v in given.items() if k != "params"})
        on_device = {
            id(p)
            for group in self.optimizer.param_groups
            if group.get("capturable") or group.get("fused")
            for p in group["params"]
        }
        for place, parameter, _ in self._stepped():
            device = parameter.device if id(parameter) in on_device else "cpu"
            for key, value in scalars.get(place.name, {}).items():
                kept = value.to(device, copy=True) if isinstance(value, torch.Tensor) else value
                self.optimizer.state[parameter][key] = kept

    @torch.no_grad()
    def settle(self) -> None:
        """After the parts were filled. Collective."""
        if self.zero is None:
            return
        for flat in self.zero._flats:
            if flat.own is not flat.master:
                flat.own.copy_(flat.master)
        settle(self.zero)


def _unwrapped(model: nn.Module) -> tuple[nn.Module, Zero | None, Pipeline | None]:
    zero: Zero | None = None
    pipeline: Pipeline | None = None
    while True:
        if isinstance(model, HybridModel):
            return model.module, model.zero, model.pipeline
        if isinstance(model, Zero):
            zero, model = model, model.module
        elif isinstance(model, Pipeline):
            pipeline, model = model, model.module
        elif isinstance(model, (DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):  # torch.compile's
            model = model._orig_mod  # type: ignore[assignment]
        else:
            return model, zero, pipeline


def _persistent(module: nn.Module) -> Iterator[str]:
    for prefix, each in module.named_modules(remove_duplicate=False):
        for name, buffer in each._buffers.items():
            if buffer is not None and name not in each._non_persistent_buffers_set:
                yield f"{prefix}.{name}" if prefix else name


def _state(name: str, key: str) -> str:
    return f"optimizer.state.{name}.{key}"


def _whole(tensor: torch.Tensor) -> ShardTensor:
    held = [((0,) * tensor.dim(), tensor.detach())] if tensor.numel() else []
    return ShardTensor(tensor.shape, tensor.dtype, held)


def _is_number(key: str, value: torch.Tensor, place: Place) -> bool:
    """Whether all elements share it, rather than that it is of a parameter without dims."""
    return value.dim() == 0 and (key in SCALARS or len(place.full_shape) > 0)


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, torch.Tensor) else value
