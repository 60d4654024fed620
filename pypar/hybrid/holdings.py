"""What a rank keeps of its parameters, gradients and optimizer states, and what the data axis sends, by the layouts."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from pypar.gradients.buckets import ALIGN_BYTES
from pypar.hybrid.dry_step import GradientsOf, Stage
from pypar.hybrid.plan import Plan
from pypar.hybrid.shards import stage_of_unit
from pypar.hybrid.traffic import Count, all_reduced
from pypar.zero.partition import Layout, lay_out
from pypar.zero.reducer import MEMORIES
from pypar.zero.units import units_of

CONTROL = "all"  # what all ranks tell each other


@dataclass(frozen=True)
class OptimizerCost:
    """bytes_per_element of state, and bytes_per_parameter beside, as a rank's optimizer keeps them."""

    bytes_per_element: float
    bytes_per_parameter: int

    @classmethod
    def of(cls, make: Callable[..., torch.optim.Optimizer], settings: dict[str, Any], dtype: torch.dtype) -> Any:
        """Found by a step on a tiny parameter."""
        count = 64
        with torch.enable_grad():
            parameter = nn.Parameter(torch.zeros(count, dtype=dtype))
            parameter.grad = torch.zeros_like(parameter)
            optimizer = make([parameter], **settings)
            optimizer.step()
        states = [v for v in optimizer.state[parameter].values() if isinstance(v, torch.Tensor)]
        return cls(
            sum(v.nbytes for v in states if v.numel() == count) / count,
            sum(v.nbytes for v in states if v.numel() != count),
        )

    def __call__(self, sizes: Sequence[int]) -> int:
        """sizes: elements of each parameter, or piece of one."""
        return round(self.bytes_per_element * sum(sizes)) + self.bytes_per_parameter * len(sizes)


@dataclass(frozen=True)
class Flat:
    """As pypar.zero.flat.FlatParameters, without values."""

    unit: str
    parameters: tuple[nn.Parameter, ...]
    dtype: torch.dtype
    layout: Layout

    @property
    def is_trained(self) -> bool:
        return self.parameters[0].requires_grad

    @property
    def num_bytes(self) -> int:
        return self.layout.numel * self.dtype.itemsize

    @property
    def is_wide(self) -> bool:
        return self.dtype in (torch.float32, torch.bfloat16, torch.float16)

    @property
    def shard_bytes(self) -> int:
        """Of the reduced gradients of a rank."""
        return (
            self.num_bytes
            // self.layout.world_size
            * (4 if self.is_wide else self.dtype.itemsize)
            // (self.dtype.itemsize)
        )


@dataclass(frozen=True)
class Held:
    """Bytes of a rank, where ranks of one host share memory its part of it. host_parameters: what the ranks of its
    data-parallel group hold together on one host."""

    parameters: int
    host_parameters: int
    gradients: int  # that are there all the time
    optimizer: int
    step: int  # for the time of optimizer.step(), when activations and other gradients may be gone


def gradients_of(plan: Plan, num_parts: int) -> Callable[[Stage], GradientsOf]:
    """As pypar.parallelize places them. num_parts: micro-batches."""

    def of(stage: Stage) -> GradientsOf:
        resident = plan.zero == 1 or (plan.zero == 0 and plan.dp > 1)
        resident = resident or (plan.zero >= 2 and plan.pp == 1 and num_parts == 1)
        if plan.zero < 2 or plan.pp == 1 or plan.reduce == "once":
            return GradientsOf(resident)
        early = {number: parameters for number, parameters in _early(stage, flats_of(stage.module, plan))}
        return GradientsOf(resident, lambda number: early.get(number, ()))

    return of


def flats_of(module: nn.Module, plan: Plan) -> list[Flat]:
    found = []
    shard = plan.dp // plan.replicate
    for unit in units_of(module):
        kinds: dict[tuple[torch.dtype, bool], list[nn.Parameter]] = {}
        for parameter in unit.parameters:
            kinds.setdefault((parameter.dtype, parameter.requires_grad), []).append(parameter)
        for (dtype, _), parameters in kinds.items():
            layout = lay_out([p.numel() for p in parameters], shard, dtype.itemsize)
            found.append(Flat(unit.name, tuple(parameters), dtype, layout))
    return found


def _early(stage: Stage, flats: Sequence[Flat]) -> Iterator[tuple[int, list[nn.Parameter]]]:
    """(stage, parameters) whose gradients become shards after each micro-batch: pypar.hybrid.shards."""
    assert stage.cut is not None
    for number in {part.stage for part in stage.cut.parts}:
        parameters = [p for flat in flats if _stage_of(flat, stage) == number for p in flat.parameters]
        yield number, parameters


def _stage_of(flat: Flat, stage: Stage) -> int | None:
    return stage_of_unit(flat.unit, stage.cut, stage.here) if stage.cut is not None and flat.is_trained else None


def held(stage: Stage, plan: Plan, dp_rank: int, cost: OptimizerCost) -> Held:
    parameters = list(stage.module.parameters())
    trained = [p for p in parameters if p.requires_grad]
    if not plan.zero or not trained:
        size = sum(_nbytes(p) for p in parameters)
        buckets = 0
        if plan.dp > 1:
            buckets = sum(-(-_nbytes(p) // ALIGN_BYTES) * ALIGN_BYTES for p in trained)
        largest = max((_nbytes(p) for p in trained), default=0)
        return Held(size, size * plan.dp, buckets, cost([p.numel() for p in trained]), 2 * largest)
    flats = flats_of(stage.module, plan)
    shard = plan.dp // plan.replicate
    rank = dp_rank % shard
    ours = [flat for flat in flats if flat.is_trained]
    pieces = [p.end - p.begin for flat in ours for p in flat.layout.pieces(rank)]
    size = sum(flat.num_bytes for flat in flats)
    masters = sum(4 * flat.layout.numel // shard for flat in flats if flat.dtype.itemsize < 4)
    full = sum(flat.num_bytes for flat in ours)
    if plan.zero > 1:
        by_type: dict[torch.dtype, list[int]] = {}
        for flat in ours:
            by_type.setdefault(flat.dtype, []).append(flat.num_bytes)
        full = sum(max(sizes) * min(MEMORIES, len(sizes)) for sizes in by_type.values())
    gradients = full + sum(flat.shard_bytes for flat in ours)
    return Held(size // shard, size * plan.replicate, gradients, cost(pieces) + masters, 0)


def sent(stage: Stage, plan: Plan, dp_rank: int, num_parts: int) -> dict[tuple[str, str], Count]:
    """What a step sends over the data axis, and what all ranks tell each other: train_step, then optimizer.step."""
    found: dict[tuple[str, str], Count] = {}

    def add(axis: str, op: str, count: Count) -> None:
        found[axis, op] = found.get((axis, op), 0) + count

    world = plan.world_size
    add(CONTROL, "all_gather", 48 * (world - 1))  # pypar.hybrid.agree
    add(CONTROL, "all_reduce", all_reduced(24, world))  # the loss
    trained = [p for p in stage.module.parameters() if p.requires_grad]
    if not trained:
        return found
    if plan.zero:
        _zero(add, stage, plan, dp_rank, len(trained))
        return found
    if plan.dp > 1:
        add("dp", "all_reduce", sum(all_reduced(-(-_nbytes(p) // ALIGN_BYTES) * ALIGN_BYTES, plan.dp) for p in trained))
        if plan.pp > 1:
            add("dp", "all_reduce", all_reduced(4 * len(trained), plan.dp))
        elif dp_rank == 0:  # before the first forward of a step
            add("dp", "broadcast", sum(_nbytes(b) for b in stage.module.buffers()) * (plan.dp - 1))
    return found


Add = Callable[[str, str, Count], None]


def _zero(add: Add, stage: Stage, plan: Plan, dp_rank: int, num_trained: int) -> None:
    shard = plan.dp // plan.replicate
    for flat in flats_of(stage.module, plan):
        if not flat.is_trained:
            continue
        where = _stage_of(flat, stage) if plan.zero > 1 and plan.pp > 1 and plan.reduce != "once" else None
        times = 1 if where is None else stage.reductions.get(where, 0)
        if flat.is_wide:
            add("dp", "zero_scatter", times * (flat.num_bytes - flat.num_bytes // shard))
            add("dp", "all_reduce", times * all_reduced(flat.shard_bytes, plan.replicate))
        else:
            add("dp", "all_reduce", times * all_reduced(flat.num_bytes, shard))
            add("dp", "all_reduce", times * all_reduced(flat.num_bytes // shard, plan.replicate))
    if plan.pp > 1:  # which parameters got a gradient
        for size in (shard, plan.replicate):
            add("dp", "all_reduce", all_reduced(4 * num_trained, size))
    add("dp", "all_reduce", all_reduced(8, shard))  # whether all gradients are finite
    for axis in ("tp", "pp"):
        add(axis, "all_reduce", all_reduced(8, getattr(plan, axis)))


def buffer_bytes(module: nn.Module) -> int:
    return sum(_nbytes(b) for b in module.buffers())


def _nbytes(x: torch.Tensor) -> int:
    return math.prod(x.shape) * x.dtype.itemsize
