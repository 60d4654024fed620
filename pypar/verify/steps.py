"""The same few training steps, in one process and on the ranks of a plan, with all that can be compared."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from pypar.hybrid import (
    HybridModel,
    HybridOptimizer,
    Plan,
    gather_grads,
    gather_optimizer_state,
    gather_state,
    parallelize,
)
from pypar.pipeline_parallel.batch import Caller, Losses, LossFn
from pypar.verify.holders import Holder, holders_of, replicas_that_differ
from pypar.verify.outputs import Outputs

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


def default_options(optimizer: Callable[..., torch.optim.Optimizer], lr: float = 1e-3) -> dict[str, Any]:
    """lr, and where the optimizer has one an eps of 1e-5, so that gradients which are nothing but rounding don't become
    steps."""
    return {"lr": lr, **({"eps": 1e-5} if "eps" in inspect.signature(optimizer).parameters else {})}


class DrawsRandomError(Exception):
    """A model drew random numbers where it was to be the reference of ranks, which draw others."""


@dataclass
class Run:
    """losses, norms: per step (norms where gradients are clipped). gradients: per step, before clipping. weights and
    states: after the last. All full, under the names of the plain model. outputs: of the first step's forward, of each
    block the sum of absolute values. holders: of each parameter. apart: names of tensors that should be the same on
    several ranks and are not, with these ranks."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    gradients: list[Tensors] = field(default_factory=list)
    weights: Tensors = field(default_factory=dict)
    states: dict[str, Tensors] = field(default_factory=dict)
    outputs: dict[str, float] = field(default_factory=dict)
    holders: dict[str, list[Holder]] = field(default_factory=dict)
    apart: dict[str, tuple[int, int]] = field(default_factory=dict)


Say = Callable[[str], None]
Named = list[tuple[str, nn.Parameter]]


def alone(model: nn.Module, batches: Sequence[Any], settings: Settings, say: Say | None = None) -> Run:
    """In this process, with torch alone: each batch whole. batches: `accumulate` per step of the optimizer.

    Raises DrawsRandomError after a forward that drew from torch's default generator."""
    call, outputs = Caller(model), Outputs(model)

    def learn(batch: Any, _named: Named) -> float:
        losses = Losses.of(batch, settings.loss_fn)
        drawn = torch.get_rng_state()
        with outputs.watching(not outputs.found):
            share = losses.add(call(batch), batch)
        if not torch.equal(drawn, torch.get_rng_state()):
            raise DrawsRandomError("the model draws random numbers in its forward")
        (share / losses.count if losses.is_sum else share).backward()
        return losses.mean

    run = in_one_process(model, batches, settings, learn, say)
    run.outputs = outputs.found
    return run


def in_one_process(
    model: nn.Module,
    batches: Sequence[Any],
    settings: Settings,
    learn: Callable[[Any, Named], float],
    say: Say | None = None,
) -> Run:
    """learn(batch, trained parameters): adds the gradients of its mean loss to param.grad, and returns that."""
    run = Run()
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    optimizer = settings.optimizer([p for _, p in named], **settings.options)
    for step, first in enumerate(range(0, len(batches), settings.accumulate)):
        run.losses.append([learn(batch, named) for batch in batches[first : first + settings.accumulate]][-1])
        every = model.named_parameters(remove_duplicate=False)
        run.gradients.append({n: p.grad.clone() for n, p in every if p.grad is not None})
        if settings.clip is not None:
            run.norms.append(float(nn.utils.clip_grad_norm_([p for _, p in named], settings.clip)))
        optimizer.step()
        optimizer.zero_grad()
        if say is not None:
            say(f"one process, step {step + 1}: loss {run.losses[-1]:.6f}")
    run.weights = {n: t.detach().clone() for n, t in model.state_dict().items()}
    states = {n: optimizer.state[p] for n, p in named if optimizer.state.get(p)}
    run.states = {n: {k: v.clone() for k, v in s.items() if isinstance(v, torch.Tensor)} for n, s in states.items()}
    return run


def together(
    model: nn.Module,
    plan: Plan,
    batches: Sequence[Any],
    settings: Settings,
    *,
    tamper: Callable[[HybridModel, HybridOptimizer], None] | None = None,
    say: Say | None = None,
) -> Run:
    """On the ranks of this job, under the plan; whole on rank 0, elsewhere with losses and norms alone. Collective.

    tamper(model, optimizer): called before the first step, for tests that plant a fault."""
    run = Run()
    outputs = Outputs(model)
    hybrid, optimizer = parallelize(model, plan, settings.optimizer, **settings.options)
    outputs.of_stages(hybrid)
    if tamper is not None:
        tamper(hybrid, optimizer)
    for step, first in enumerate(range(0, len(batches), settings.accumulate)):
        for batch in batches[first : first + settings.accumulate]:
            with outputs.watching(first == 0 and not outputs.found):
                loss = hybrid.train_step(hybrid.local_batch(batch), settings.loss_fn)
        if step == 0:
            run.apart |= replicas_that_differ(hybrid, "gradient of")
        run.losses.append(float(loss))
        run.gradients.append(gather_grads(hybrid))
        if settings.clip is not None:
            run.norms.append(optimizer.clip_grad_norm_(settings.clip))
        optimizer.step()
        optimizer.zero_grad()
        if say is not None and dist.get_rank() == 0:
            say(f"{plan.world_size} ranks, step {step + 1}: loss {float(loss):.6f}")
    run.apart |= replicas_that_differ(hybrid, "weight")
    run.weights = gather_state(hybrid)
    run.states = gather_optimizer_state(hybrid, optimizer)
    run.outputs = outputs.joined(hybrid)
    run.holders = holders_of(hybrid)
    return run
