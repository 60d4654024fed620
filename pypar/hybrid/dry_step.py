"""A training step of one tensor-parallel rank of every stage, run dry, in the order of pypar.parallelize's model."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode

from pypar.hybrid.dry import DryChannel, DryLosses, Live, one_sequence_per_row, quiet, stand_in, without_values
from pypar.hybrid.loss import entropy_of
from pypar.hybrid.parallelize import starts_of
from pypar.hybrid.plan import Plan
from pypar.hybrid.recompute import recompute_blocks
from pypar.hybrid.traffic import Count, Traffic
from pypar.pipeline_parallel.batch import Caller, LossFn, cut_batch
from pypar.pipeline_parallel.engine import Engine
from pypar.pipeline_parallel.generators import make_schedule
from pypar.pipeline_parallel.plan import FORWARD, Link, links, slots_needed
from pypar.pipeline_parallel.ring import Edge
from pypar.pipeline_parallel.schedule import Schedule
from pypar.pipeline_parallel.simulate import simulate
from pypar.pipeline_parallel.stage import Stages
from pypar.pipeline_parallel.tied import Tied, find_tied
from pypar.pipeline_parallel.weight_grads import WeightQueue, attach
from pypar.pipeline_parallel.wrap import SPARE_BYTES
from pypar.placement import Cut, cut
from pypar.tensor_parallel.parallelize import cut_for
from pypar.tensor_parallel.shards import Place


@dataclass
class Stage:
    """What the dry step found of one rank of the pipeline.

    module      what is left on this rank, without values
    here        its stages
    activations, gradients
                bytes at the moment when both are the most together; gradients where they aren't in buckets
    whole_gradients
                the same of all gradients together, at the end of the step
    ring_bytes  memory of its ends of the rings
    sent        (axis, op) -> bytes of the step
    reductions  {stage: how often its buckets are reduced, where that is after each micro-batch}
    """

    module: nn.Module
    cut: Cut | None
    here: set[int] = field(default_factory=set)
    activations: int = 0
    gradients: int = 0
    whole_gradients: int = 0
    ring_bytes: int = 0
    sent: dict[tuple[str, str], Count] = field(default_factory=dict)
    reductions: dict[int, int] = field(default_factory=dict)

    def add(self, axis: str, op: str, num_bytes: Count) -> None:
        self.sent[axis, op] = self.sent.get((axis, op), 0) + num_bytes


Grads = Callable[[Stage], "GradientsOf"]


@dataclass
class GradientsOf:
    """Where a rank's gradients go. resident: memory that is there all the time takes them; else each is made when it
    is first needed. shared_out(stage): parameters whose gradients are gone after each micro-batch of that stage."""

    resident: bool
    shared_out: Callable[[int], Sequence[nn.Parameter]] = lambda stage: ()


def dry_step(
    module: nn.Module, plan: Plan, share: Any, tp_rank: int, loss_fn: LossFn | None, least: int, gradients: Grads
) -> list[Stage]:
    """One per rank of the pipeline. share: batch of a data-parallel rank, of which the shapes count. least: samples of
    the smallest share. Raises ValueError where the module or loss_fn asks for values."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    try:
        with stand_in(tp_rank, plan.tp) as group, _quiet_generator(), one_sequence_per_row(), _young():
            starts = starts_of(module, plan)
            modules = [_cut_for_rank(module, plan, tp_rank, group.group_name, mode) for _ in range(plan.pp)]
            with mode:
                share = torch.utils._pytree.tree_map_only(torch.Tensor, _empty_like, share)
                parts = cut_batch(share, min(plan.micro_batches, least))
                losses = DryLosses(loss_fn, 1, entropy=entropy_of(modules[0], group if plan.tp > 1 else None))
                run = _plain if plan.pp == 1 else _pipeline
                stages = run(modules, plan, parts, losses, gradients, starts)
            for stage in stages:
                stage.sent = {
                    ("tp" if axis == group.group_name else axis, op): count for (axis, op), count in stage.sent.items()
                }
            return stages
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        raise ValueError(
            f"estimate: the module or loss_fn looks at the values of a tensor ({error.func}), and there are none "
            "before a run; leave that out while estimating, for example with a loss_fn of its own"
        ) from error


def shapes_of(module: nn.Module, plan: Plan, tp_rank: int) -> tuple[torch.Size, ...]:
    """Of the parameters of one tensor-parallel rank."""
    with stand_in(tp_rank, plan.tp) as group:
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        return tuple(p.shape for p in _cut_for_rank(module, plan, tp_rank, group.group_name, mode).parameters())


def _cut_for_rank(module: nn.Module, plan: Plan, tp_rank: int, name: str, mode: FakeTensorMode) -> nn.Module:
    part = without_values(module, mode, torch.bfloat16 if plan.precision == "bfloat16" else None)
    quiet(part)
    part.train()
    with mode:
        if plan.tp > 1:
            cut_for(
                part, Place(name, tp_rank, plan.tp), plan.tp_plan,
                sequence_parallel=plan.sequence_parallel, loss_parallel=plan.loss_parallel,
            )  # fmt: skip
        if plan.recompute:
            recompute_blocks(part)
    return part


def _empty_like(x: torch.Tensor) -> torch.Tensor:
    return torch.empty(x.shape, dtype=x.dtype)


@contextmanager
def _young() -> Iterator[None]:
    """Within the block the garbage collector looks at what is made there alone: checkpoints leave cycles, and going
    through all that Python has takes a fraction of a second each time."""
    if gc.get_freeze_count():  # somebody else keeps it from objects of theirs
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@contextmanager
def _quiet_generator() -> Iterator[None]:
    """torch's default generator is afterwards where it was."""
    state = torch.default_generator.get_state()
    try:
        yield
    finally:
        torch.default_generator.set_state(state)


def _prepare(
    stage: Stage, gradients: GradientsOf, kept: Sequence[torch.Tensor], tied: Sequence[Tied] = ()
) -> Live:  # fmt: skip
    parameters = list(stage.module.parameters())
    apart = {id(t.parameter) for t in tied if len(t.ranks) > 1}  # which gradients there are of them is to be seen
    views = []
    if gradients.resident:
        for parameter in parameters:
            if parameter.requires_grad and id(parameter) not in apart:
                parameter.grad = torch.empty_like(parameter)
                views.append(parameter.grad)
    return Live([*parameters, *stage.module.buffers(), *views, *kept], parameters)


def _tensors(batch: Any) -> list[torch.Tensor]:
    return [x for x in torch.utils._pytree.tree_leaves(batch) if isinstance(x, torch.Tensor)]


def _finish(stage: Stage, live: Live, traffic: Traffic) -> None:
    stage.activations, stage.gradients = live.peak - live.gradients_at_peak, live.gradients_at_peak
    stage.whole_gradients = live.gradients
    for (group, op), count in traffic.sent.items():
        stage.add(group, op, count)


def _plain(
    modules: list[nn.Module], plan: Plan, parts: list[Any], losses: DryLosses, gradients: Grads, _: Any
) -> list[Stage]:
    """Micro-batches one after the other."""
    stage = Stage(modules[0], None)
    how = gradients(stage)
    live, traffic = _prepare(stage, how, _tensors(parts)), Traffic()
    if how.resident:  # weight gradients are computed straight into their buckets: pypar.gradients.linear
        attach(stage.module, WeightQueue(), set())
    call = Caller(stage.module)
    with live, traffic:
        for part in parts:
            loss = losses.add(call(part), part)
            loss.backward()
            del loss
            live.claim()
            gc.collect()
    _finish(stage, live, traffic)
    return [stage]


def _pipeline(
    modules: list[nn.Module], plan: Plan, parts: list[Any], losses: DryLosses, gradients: Grads, starts: Any
) -> list[Stage]:
    """All ranks of the pipeline in this process, action by action, each in its turn."""
    schedule = make_schedule(plan.schedule, plan.pp, len(parts), plan.num_stages)
    slots = slots_needed(schedule, holds=True)
    copies, slots = slots is None, slots if slots is not None else slots_needed(schedule, holds=False)
    if slots is None:
        raise ValueError(f"schedule '{schedule.name}' needs more than 64 messages under way")
    channels = {link: DryChannel() for link in links(schedule)}
    ranks = [
        _rank(module, plan, schedule, rank, starts, channels, copies, gradients, _tensors(parts))
        for rank, module in enumerate(modules)
    ]
    for link, channel in channels.items():
        channel.receiver = ranks[schedule.rank_of(link.target)].live
    spans = [(span.start, rank, span.action) for rank, row in enumerate(simulate(schedule).spans) for span in row]
    for _, number, action in sorted(spans, key=lambda span: span[:2]):
        rank = ranks[number]
        with rank.live, rank.traffic:
            rank.engine._do(action, parts[action.micro_batch], losses, action.micro_batch)
            rank.live.claim()
            if action.kind in "BW":
                rank.stage.reductions[action.stage] = rank.stage.reductions.get(action.stage, 0) + 1
                for parameter in rank.gradients.shared_out(action.stage):
                    parameter.grad = None
        if action.kind in "BW":
            gc.collect()
    for number, rank in enumerate(ranks):
        _finish(rank.stage, rank.live, rank.traffic)
        _rings(rank.stage, number, schedule, slots, channels)
        _tied(rank.stage, rank.tied)
    return [rank.stage for rank in ranks]


@dataclass
class _Rank:
    """Of the pipeline."""

    stage: Stage
    engine: Engine
    tied: list[Tied]
    gradients: GradientsOf
    live: Live
    traffic: Traffic


def _rank(
    module: nn.Module, plan: Plan, schedule: Schedule, rank: int, starts: Any, channels: Any, copies: bool,
    gradients: Grads, kept: Sequence[torch.Tensor],
) -> _Rank:  # fmt: skip
    """As pypar.Pipeline sets one up."""
    pieces, queue = cut(module, schedule.num_stages, starts), WeightQueue()
    here = {s for s in range(schedule.num_stages) if schedule.rank_of(s) == rank}
    tied = find_tied(module, pieces, schedule.rank_of, plan.pp, rank)
    first = {id(t.parameter): t.parts[0] for t in tied if t.parts and t.parameter is not None}
    for part in pieces.parts:
        if part.stage in here:
            attach(part.module, queue, {key for key, name in first.items() if name != part.name})
    stages = Stages(module, pieces, here, plan.carry)
    mine = {
        link: channel for link, channel in channels.items()
        if rank in (schedule.rank_of(link.stage), schedule.rank_of(link.target))
    }  # fmt: skip
    stage = Stage(module, pieces, here)
    how = gradients(stage)
    return _Rank(stage, Engine(stages, queue, mine, copies), tied, how, _prepare(stage, how, kept, tied), Traffic())


def _rings(stage: Stage, rank: int, schedule: Schedule, slots: dict[Link, int], channels: Any) -> None:
    for link, count in slots.items():
        ends = schedule.rank_of(link.stage), schedule.rank_of(link.target)
        size = channels[link if link.direction == FORWARD else Link(link.target, FORWARD)].most_bytes
        if rank in ends:
            stage.ring_bytes += Edge(*ends, count, size + SPARE_BYTES).region_bytes
        if rank == ends[0]:
            stage.add("pp", "ring", channels[link].sent_bytes)


def _tied(stage: Stage, tied: list[Tied]) -> None:
    """The gradients of tied weights, and how many each rank has of one, go to the others that hold it."""
    for each in tied:
        parameter = each.parameter
        if parameter is None or not parameter.requires_grad or len(each.ranks) == 1:
            continue
        grads = [g for g in (parameter.grad, getattr(parameter, "_pypar_second_grad", None)) if g is not None]
        mine = sum(g.numel() * g.dtype.itemsize for g in grads)
        stage.add("pp", "send", (8 + mine) * (len(each.ranks) - 1))
        stage.whole_gradients += (len(each.ranks) - 1) * mine
