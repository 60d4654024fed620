"""Gradients that become shards after each micro-batch of a pipeline (ZeRO 2 and 3)."""

from __future__ import annotations

from typing import Any

import torch

from pypar.placement import Cut
from pypar.zero import Zero


def stage_of_buckets(zero: Zero, cut: Cut, here: set[int]) -> dict[int, list[Any]]:
    """{stage: buckets whose parameters, of the stages `here`, that one uses alone}. The others' gradients (an embedding
    that is the head as well, what stands outside of the units) are added up whole, and reduced at the end of the
    step."""
    stages: dict[int, list[Any]] = {part.stage: [] for part in cut.parts}
    for bucket in zero._reducer.buckets:
        stage = stage_of_unit(bucket.parameters.unit, cut, here)
        if stage is not None:
            stages[stage].append(bucket)
    return stages


def stage_of_unit(unit: str, cut: Cut, here: set[int]) -> int | None:
    """The stage of `here` that alone uses a unit of ZeRO's; None where there isn't one."""
    around = {p.stage for p in cut.parts if p.is_inner and f"{unit}.".startswith(f"{p.name}.")}
    inside = {p.stage for p in cut.parts if p.block and unit and p.name.startswith(f"{unit}.")}
    users = (around or inside) & here
    return users.pop() if len(users) == 1 else None


class ShardsAside:
    """The shards of earlier steps, while those of one are made whose factor is known at its end only."""

    def __init__(self, reducer: Any):
        self._kept = [(b, b.shard.clone()) for b in reducer.buckets if b.has_shard]
        self._reducer = reducer
        for bucket, _ in self._kept:
            bucket.has_shard = False

    @torch.no_grad()
    def join(self, factor: float) -> None:
        """This step's shards times the factor, and the earlier ones."""
        if factor != 1.0:
            for bucket in self._reducer.buckets:
                if bucket.has_shard:
                    bucket.scale(factor)
        for bucket, kept in self._kept:
            if bucket.has_shard:
                bucket.shard.add_(kept)
                bucket.squares = None
            else:
                bucket.shard.copy_(kept)
                bucket.has_shard = True
