"""One process that draws the random numbers of a plan: the reference of models with dropout."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from pypar.hybrid import Plan
from pypar.hybrid.model import seeded as seeded_at
from pypar.pipeline_parallel import Pipeline
from pypar.pipeline_parallel.batch import Caller, Losses, cut_batch, size_of
from pypar.tensor_parallel import tensor_parallel
from pypar.verify.steps import Named, Run, Settings, in_one_process

_FLOATS = ("dropout", "pdrop", "dropout_p", "dropout_prob")


def _rates(model: nn.Module) -> Iterator[tuple[nn.Module, str, float]]:
    """(module, name, value) of the attributes that are a probability of dropping something out."""
    for module in model.modules():
        for name, value in vars(module).items():
            is_rate = name.endswith(_FLOATS) and not name.startswith("_")
            is_rate = is_rate or (name == "p" and "Drop" in type(module).__name__)
            if is_rate and isinstance(value, (int, float)) and not isinstance(value, bool):
                yield module, name, value


def has_dropout(model: nn.Module) -> bool:
    """Whether a module has a probability of dropping something out."""
    return any(value > 0 for _, _, value in _rates(model))


def set_dropout(model: nn.Module, rate: float) -> None:
    """Every rate of dropout in the model. Raises ValueError where it has none, and for one that is not in [0, 1)."""
    if not 0 <= rate < 1:
        raise ValueError(f"a dropout of {rate:g} is not in [0, 1)")
    found = list(_rates(model))
    if not found:
        raise ValueError("the model has no dropout to set")
    for module, name, _ in found:
        setattr(module, name, float(rate))


def seeded(model: nn.Module, plan: Plan, batches: Sequence[Any], settings: Settings) -> Run:
    """In a job of one rank: the batch in the pieces of the plan's shares and micro-batches, each with the seed that it
    has there. Of a plan with a pipeline or tensor parallel the model is wrapped for one rank, which draws by block or
    by element as many ranks do."""
    if plan.tp > 1:
        tensor_parallel(model, None, plan.tp_plan)
    pipeline = Pipeline(model, schedule="gpipe", micro_batches=1) if plan.pp > 1 else None
    call = Caller(model)

    def learn(batch: Any, named: Named) -> float:
        losses, parts = Losses.of(batch, settings.loss_fn), _pieces(batch, plan)
        base = int(torch.randint(1 << 40, (1,), dtype=torch.int64))
        if pipeline is not None:
            return pipeline.accumulate(parts, losses, base, lambda found: (found.mean, found.scale, found.is_sum))
        before = [None if p.grad is None else p.grad.clone() for _, p in named]
        for number, part in enumerate(parts):
            with seeded_at(base + number, model.training):
                share = losses.add(call(part), part)
            share.backward()
        if losses.is_sum:
            _rescale([p for _, p in named], before, losses.scale)
        return losses.mean

    return in_one_process(model, batches, settings, learn)


def _pieces(batch: Any, plan: Plan) -> list[Any]:
    shares = cut_batch(batch, plan.dp)
    count = min(plan.micro_batches, *(size_of(each) for each in shares))
    return [part for each in shares for part in cut_batch(each, count)]


@torch.no_grad()
def _rescale(parameters: list[nn.Parameter], before: list[torch.Tensor | None], factor: float) -> None:
    """This step's gradients times the factor; the ones before stay."""
    for parameter, earlier in zip(parameters, before, strict=True):
        if parameter.grad is not None:
            new = parameter.grad if earlier is None else parameter.grad - earlier
            parameter.grad = new * factor if earlier is None else earlier + new * factor
