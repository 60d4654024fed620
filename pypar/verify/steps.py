"""The same few training steps, in one process and on the ranks of a plan, with all that can be compared."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from pypar.hybrid import Plan, gather_grads, gather_optimizer_state, gather_state, parallelize
from pypar.pipeline_parallel.batch import Caller, Losses, LossFn

Tensors = dict[str, torch.Tensor]


@dataclass
class Settings:
    """optimizer: a class and its settings. clip: the largest norm of the gradients, or None. accumulate: train_steps
    per step of the optimizer. loss_fn: as train_step takes it."""

    optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.AdamW
    options: dict[str, Any] = field(default_factory=lambda: {"lr": 1e-3, "eps": 1e-5})
    clip: float | None = None
    accumulate: int = 1
    loss_fn: LossFn | None = None


@dataclass
class Run:
    """losses, norms: per step (norms where gradients are clipped). gradients: per step, before clipping. weights and
    states: after the last. All full, under the names of the plain model."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    gradients: list[Tensors] = field(default_factory=list)
    weights: Tensors = field(default_factory=dict)
    states: dict[str, Tensors] = field(default_factory=dict)


def alone(model: nn.Module, batches: Sequence[Any], settings: Settings) -> Run:
    """In this process, with torch alone: each batch whole. batches: `accumulate` per step of the optimizer."""
    run = Run()
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    optimizer = settings.optimizer([p for _, p in named], **settings.options)
    call = Caller(model)
    for first in range(0, len(batches), settings.accumulate):
        loss = 0.0
        for batch in batches[first : first + settings.accumulate]:
            losses = Losses.of(batch, settings.loss_fn)
            share = losses.add(call(batch), batch)
            (share / losses.count if losses.is_sum else share).backward()
            loss = losses.mean
        run.losses.append(loss)
        every = model.named_parameters(remove_duplicate=False)
        run.gradients.append({n: p.grad.clone() for n, p in every if p.grad is not None})
        if settings.clip is not None:
            run.norms.append(float(nn.utils.clip_grad_norm_([p for _, p in named], settings.clip)))
        optimizer.step()
        optimizer.zero_grad()
    run.weights = {n: t.detach().clone() for n, t in model.state_dict().items()}
    run.states = {n: {k: v.clone() for k, v in optimizer.state[p].items()} for n, p in named if p in optimizer.state}
    return run


def together(model: nn.Module, plan: Plan, batches: Sequence[Any], settings: Settings) -> Run:
    """On the ranks of this job, under the plan; whole on rank 0, elsewhere with losses and norms alone. Collective."""
    run = Run()
    hybrid, optimizer = parallelize(model, plan, settings.optimizer, **settings.options)
    for first in range(0, len(batches), settings.accumulate):
        for batch in batches[first : first + settings.accumulate]:
            loss = hybrid.train_step(hybrid.local_batch(batch), settings.loss_fn)
        run.losses.append(float(loss))
        run.gradients.append(gather_grads(hybrid))
        if settings.clip is not None:
            run.norms.append(optimizer.clip_grad_norm_(settings.clip))
        optimizer.step()
        optimizer.zero_grad()
    run.weights = gather_state(hybrid)
    run.states = gather_optimizer_state(hybrid, optimizer)
    return run
