"""Which rank holds which part of a parameter, so that a wrong element has an owner."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from pypar.hybrid import HybridModel
from pypar.tensor_parallel.state import shards_by_name


@dataclass(frozen=True)
class Holder:
    """where: pp, dp and tp coordinates. dim, ranges: of the full parameter, that are here (None: all). pieces: of the
    elements here, flat, those that this rank's optimizer steps (None: all)."""

    rank: int
    where: str
    shape: tuple[int, ...]
    dim: int | None
    ranges: tuple[tuple[int, int], ...]
    pieces: tuple[tuple[int, int], ...] | None

    def has(self, index: tuple[int, ...]) -> bool:
        """Whether an element of the full parameter is this rank's."""
        local = list(index)
        if self.dim is not None:
            before = 0
            for begin, end in self.ranges:
                if begin <= index[self.dim] < end:
                    local[self.dim] = before + index[self.dim] - begin
                    break
                before += end - begin
            else:
                return False
        if self.pieces is None:
            return True
        flat = 0
        for size, at in zip(self.shape, local, strict=True):
            flat = flat * size + at
        return any(begin <= flat < end for begin, end in self.pieces)


def holders_of(model: HybridModel) -> dict[str, list[Holder]]:
    """{name of a parameter: its holders, by rank}, the same on every rank. Collective."""
    shards = shards_by_name(model.module)
    pieces: dict[str, list[tuple[int, int]]] | None = None
    shapes = {name: tuple(parameter.shape) for name, parameter in model.module.named_parameters()}
    if model.zero is not None:
        optimizer = model.zero.optimizer
        pieces = {}
        for group in optimizer.param_groups:
            for piece in group["params"]:
                start = optimizer.places[id(piece)][3]
                pieces.setdefault(optimizer.names[id(piece)], []).append((start, start + piece.numel()))
        for flat in model.zero._flats:
            shapes |= {name: tuple(shape) for name, shape in zip(flat.names, flat.shapes, strict=True)}
    mine: dict[str, Holder] = {}
    for name, shape in shapes.items():
        shard = shards.get(name)
        mine[name] = Holder(
            dist.get_rank(), str(model.axes), shape, None if shard is None else shard.dim,
            () if shard is None else tuple(shard.cut.ranges[shard.place.rank]),
            None if pieces is None else tuple(pieces.get(name, ())),
        )  # fmt: skip
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    found: dict[str, list[Holder]] = {}
    for each in everyone:
        for name, holder in each.items():
            found.setdefault(name, []).append(holder)
    return found


def replicas_that_differ(model: HybridModel, what: str) -> dict[str, tuple[int, int]]:
    """{"gradient of NAME" or "weight NAME": (a rank, another one with other bits)}, among ranks that should hold the
    same. Collective. what: "gradient of" or "weight"."""
    is_gradient = what.startswith("gradient")
    shards = shards_by_name(model.module)
    mine: dict[str, tuple[str, int]] = {}
    if not (model.zero is not None and (is_gradient or model.zero.stage == 3)):  # those are parts, not copies
        for name, parameter in model.module.named_parameters():
            tensor = parameter.grad if is_gradient else parameter.detach()
            if tensor is not None:
                part = "" if name not in shards else str(shards[name].cut.ranges[model.axes.tp_rank])
                mine[name] = part, zlib.crc32(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    first: dict[tuple[str, str], tuple[int, int]] = {}
    apart: dict[str, tuple[int, int]] = {}
    for rank, held in enumerate(everyone):
        for name, (part, digest) in held.items():
            other, theirs = first.setdefault((name, part), (rank, digest))
            if digest != theirs:
                apart.setdefault(f"{what} {name}", (other, rank))
    return apart
