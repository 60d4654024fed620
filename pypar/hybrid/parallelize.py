"""parallelize: a plain module, shared out over all ranks of the job as a plan says."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from pypar.data_parallel import DataParallel
from pypar.hybrid.axes import Axes
from pypar.hybrid.materialize import PartOfFull
from pypar.hybrid.model import HybridModel
from pypar.hybrid.norm import Norm
from pypar.hybrid.optimizer import HybridOptimizer, check_elementwise
from pypar.hybrid.plan import Plan
from pypar.hybrid.recompute import recompute_blocks
from pypar.pipeline_parallel import Pipeline
from pypar.pipeline_parallel.generators import make_schedule
from pypar.pipeline_parallel.state import aliases_of
from pypar.placement import cut
from pypar.tensor_parallel import tensor_parallel
from pypar.zero import Zero
from pypar.zero.materialize import Init, needs_memory
from pypar.zero.units import units_of

BROADCAST_BYTES = 250 * 2**20
Groups = Callable[[list[tuple[str, nn.Parameter]]], list[dict[str, Any]]]


def parallelize(
    model: nn.Module,
    plan: Plan | str | dict[str, Any],
    optimizer_class: Callable[..., torch.optim.Optimizer] = torch.optim.AdamW,
    *,
    param_groups: Groups | None = None,
    init_sync: bool = True,
    init: Init | None = None,
    **settings: Any,
) -> tuple[HybridModel, HybridOptimizer]:
    """Shares `model` out over all ranks of the job: (model, optimizer). Collective.

    model            the full one, a plain nn.Module or one of Hugging Face, the same on every rank; cut in place. It
                     may be on meta: then no rank ever holds it whole
    plan             a Plan, its text ("pp=2 dp=2 zero=1"), or its fields
    optimizer_class  of torch.optim; settings: its keyword arguments (lr=3e-4)
    param_groups     groups of [(name, parameter)] of this rank's trainable parameters, with settings of their own, in
                     the same number on every rank; default one
    init_sync        rank 0's parameters and buffers go to all ranks first
    init             of a model on meta, by rank 0, a unit at a time: "reset_parameters", a function that gets each
                     module, or a state dict of full tensors, as pypar.zero.materialize.Materializer says. Default: the
                     model's _init_weights (Hugging Face's), else reset_parameters

    The same steps in the same order give the same numbers under every plan, up to rounding: pypar.verify shows it.
    Raises PlanError (a ValueError) with the cell, the reason and the nearest legal plan; ValueError for models that
    differ between the ranks, or an optimizer that can't step parts of a parameter.
    """
    if not dist.is_initialized():
        raise ValueError("pypar.parallelize: no process group; call pypar.init() first")
    plan = Plan.of(plan)
    plan.check(dist.get_world_size(), model)
    check_elementwise(optimizer_class, plan.tp)
    _check_same(model, plan)
    on_meta = needs_memory(model)
    if init is not None and not on_meta:
        raise ValueError("pypar.parallelize: init= is for a model on the meta device; leave it out")
    full = copy.deepcopy(model) if on_meta else None
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    device = torch.get_default_device() if device.type == "meta" else device
    axes = Axes.of(plan, device.type)
    if init_sync and plan.world_size > 1 and not on_meta:
        tensors = [t.detach() for t in (*model.parameters(), *model.buffers())]
        assert dist.group.WORLD is not None
        dist._broadcast_coalesced(dist.group.WORLD, tensors, BROADCAST_BYTES, 0)
    starts = starts_of(model, plan)
    aliases = aliases_of(model)
    trained = {name: tuple(p.shape) for name, p in model.named_parameters() if p.requires_grad}
    if axes.tp_group is not None:
        tensor_parallel(
            model, axes.tp_group, plan.tp_plan,
            sequence_parallel=plan.sequence_parallel, loss_parallel=plan.loss_parallel,
        )  # fmt: skip
    if plan.recompute:
        recompute_blocks(model)
    pipeline = _pipeline(model, plan, axes, starts)
    values = None if full is None else PartOfFull(full, pipeline or model, init)
    sharded = plan.zero > 0 and any(p.requires_grad for p in model.parameters())
    if values is not None and not sharded:  # ZeRO shards each unit before the next one has values
        for _ in values.run(units_of(model)):
            pass
    norm = Norm(model, axes, pipeline.copies() if pipeline is not None else set())
    optimizer = _optimizer(model, optimizer_class, param_groups, settings)
    data = _data(model, plan, axes, optimizer, values)
    hybrid = HybridModel(model, plan, axes, pipeline, data, norm, trained, aliases)
    if isinstance(data, Zero):
        data.optimizer.agree_in = [g for g in (axes.tp_group, axes.pp_group) if g is not None]
        return hybrid, HybridOptimizer(hybrid, data.optimizer)
    return hybrid, HybridOptimizer(hybrid, optimizer)


def starts_of(model: nn.Module, plan: Plan) -> tuple[str, ...]:
    """Names of the blocks with which stages 1, 2, ... begin: found on the full model, so that all ranks agree."""
    if plan.pp == 1:
        return ()
    schedule = make_schedule(plan.schedule, plan.pp, plan.micro_batches, plan.num_stages)
    parts = [part for part in cut(model, schedule.num_stages, plan.split).parts if part.is_inner]
    first: dict[int, str] = {}
    for part in parts:
        first.setdefault(part.stage, part.name)
    return tuple(first[stage] for stage in range(1, schedule.num_stages))


def _pipeline(model: nn.Module, plan: Plan, axes: Axes, starts: tuple[str, ...]) -> Pipeline | None:
    if axes.pp_group is None:
        return None
    return Pipeline(
        model, axes.pp_group, schedule=plan.schedule, micro_batches=plan.micro_batches, split=starts,
        num_stages=plan.num_stages, carry=plan.carry, init_sync=False,
    )  # fmt: skip


def _optimizer(
    model: nn.Module, make: Callable[..., torch.optim.Optimizer], groups_of: Groups | None, settings: dict[str, Any]
) -> torch.optim.Optimizer:
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    # A group without parameters is one, so that a rank whose stage is frozen has a learning rate as well.
    groups: Iterable[dict[str, Any]] = [{"params": [p for _, p in named]}] if groups_of is None else groups_of(named)
    return make(list(groups), **settings)


def _data(
    model: nn.Module, plan: Plan, axes: Axes, optimizer: torch.optim.Optimizer, values: PartOfFull | None
) -> DataParallel | Zero | None:
    if not any(p.requires_grad for p in model.parameters()):
        return None
    by_step = axes.pp_group is not None  # gradients are reduced at its end, when it is known which there are
    if plan.zero:
        dtype = torch.bfloat16 if plan.precision == "bfloat16" else None
        return Zero(
            model, axes.shard_group, stage=plan.zero, replicate_group=axes.replicate_group, optimizer=optimizer,
            init=values, param_dtype=dtype, find_unused_parameters=by_step,
        )  # fmt: skip
    if axes.dp_group is None:
        return None
    return DataParallel(model, axes.dp_group, find_unused_parameters=by_step, init_sync=False)


def _check_same(model: nn.Module, plan: Plan) -> None:
    """Raises ValueError, on every rank, where the ranks hold different models or plans. Collective."""
    mine = [f"plan {plan}"] + [
        f"{name} {list(p.shape)} {p.dtype}{'' if p.requires_grad else ' frozen'}"
        for name, p in model.named_parameters()
    ]
    digest = int.from_bytes(hashlib.blake2b("\n".join(mine).encode(), digest_size=7).digest(), "little")
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, digest)
    other = next((rank for rank, theirs in enumerate(everyone) if theirs != everyone[0]), None)
    if other is None:
        return
    dist.all_gather_object(everyone, mine)
    pairs = zip(everyone[0], everyone[other], strict=False)
    first = next(((a, b) for a, b in pairs if a != b), (f"{len(everyone[0])} parameters", f"{len(everyone[other])}"))
    raise ValueError(
        f"pypar.parallelize: ranks 0 and {other} differ: {first[0]} there, {first[1]} here; give the same full "
        "model and plan on every rank"
    )
