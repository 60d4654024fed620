"""verify: starts the ranks, runs the same steps there and in one process, and compares."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from pypar import user_file
from pypar.hybrid import HybridModel, HybridOptimizer, Plan
from pypar.pipeline_parallel.batch import LossFn
from pypar.testing import run_ranks
from pypar.verify.report import Report, compare
from pypar.verify.seeded import has_dropout, seeded
from pypar.verify.steps import Run, Settings, alone, together

TOLERANCES = {torch.float64: (1e-10, 1e-10)}
FLOAT32 = (1e-5, 1e-6)


@dataclass
class Job:
    """model_fn: makes the model, or FILE.py:FUNCTION. batches: steps x accumulate of them."""

    model_fn: Callable[[], nn.Module] | str
    plan: Plan
    batches: list[Any]
    settings: Settings
    dtype: torch.dtype | None
    seed: int
    freeze: tuple[str, ...] = ()
    tamper: Callable[[HybridModel, HybridOptimizer], None] | None = None

    def model(self) -> nn.Module:
        """The same in every process. Raises ValueError where it is not."""
        first, second = self._make(), self._make()
        for name, parameter in first.named_parameters():
            other = dict(second.named_parameters()).get(name)
            if other is None or not torch.equal(parameter, other):
                raise ValueError(
                    f"pypar.verify: the model is another one each time that it is made ({name}), though torch's seed "
                    "is the same; draw its weights from torch's default generator"
                )
        return first

    def _make(self) -> nn.Module:
        torch.manual_seed(self.seed)
        if isinstance(self.model_fn, str):
            model = user_file.make_model(self.model_fn, user_file.load(self.model_fn)[1])
        else:
            model = self.model_fn()
        for name, parameter in model.named_parameters():
            if any(pattern in name for pattern in self.freeze):
                parameter.requires_grad_(False)
        return model if self.dtype is None else model.to(self.dtype)

    def loaded(self) -> Settings:
        """With the loss of the user's file; a function of one can't be sent to the ranks."""
        if not isinstance(self.model_fn, str) or self.settings.loss_fn is not None:
            return self.settings
        module, _ = user_file.load(self.model_fn)
        return dataclasses.replace(self.settings, loss_fn=getattr(module, "loss_fn", None))

    def cast(self) -> list[Any]:
        """The batches, in the type of the model."""

        def to(leaf: Any) -> Any:
            is_float = isinstance(leaf, torch.Tensor) and leaf.is_floating_point()
            return leaf.to(self.dtype) if is_float and self.dtype is not None else leaf

        return [torch.utils._pytree.tree_map(to, batch) for batch in self.batches]


def verify(
    model_fn: Callable[[], nn.Module] | str,
    plan: Plan | str,
    batch: Any,
    *,
    loss_fn: LossFn | None = None,
    optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.AdamW,
    options: dict[str, Any] | None = None,
    steps: int = 3,
    clip: float | None = None,
    accumulate: int = 1,
    freeze: Sequence[str] = (),
    dtype: torch.dtype | None = None,
    rtol: float | None = None,
    atol: float | None = None,
    seed: int = 0,
    timeout_s: float = 300.0,
    say: Callable[[str], None] | None = None,
    tamper: Callable[[HybridModel, HybridOptimizer], None] | None = None,
) -> Report:
    """Holds a model under a plan against one process: loss, every gradient, every updated weight of a few steps.

    model_fn    makes the full model; a function on a module's top level, which every process calls, or
                "FILE.py:FUNCTION", whose file may have a loss_fn as well
    plan        a Plan, or its text
    batch       the global batch, as train_step takes it, for every step; or a list of steps x accumulate of them
    optimizer, options
                a class of torch.optim and its settings; default AdamW with lr=1e-3 and eps=1e-5, so that gradients
                which are nothing but rounding don't become steps
    clip        the largest norm of the gradients
    freeze      parts of the names of parameters that are not trained
    dtype       torch.float64 settles what float32 leaves in doubt
    rtol, atol  default 1e-5 and 1e-6, with float64 1e-10
    timeout_s   of the ranks' waits
    say         gets a line after each step
    tamper      for tests: called with the model and the optimizer on each rank, before the first step

    The ranks are processes of this host; where a process group is there already (torchrun), its ranks are used, and all
    of them call this. A model with dropout is held against one process that draws the plan's random numbers.
    Raises PlanError for an illegal plan; ValueError for a model that isn't the same each time; RankFailed with every
    rank's traceback when one fails.
    """
    plan = Plan.parse(plan) if isinstance(plan, str) else plan
    batches = list(batch) if isinstance(batch, list) else [batch] * (steps * accumulate)
    settings = Settings(optimizer, options or Settings().options, clip, accumulate, loss_fn)
    job = Job(model_fn, plan, batches, settings, dtype, seed, tuple(freeze), tamper)
    tolerance = TOLERANCES.get(dtype, FLOAT32) if dtype is not None else FLOAT32
    rtol, atol = tolerance[0] if rtol is None else rtol, tolerance[1] if atol is None else atol
    if dist.is_initialized():
        return _here(job, rtol, atol, say)
    model = job.model()
    plan.check(None, model)
    wanted = _reference(job, model, timeout_s, say)
    limit = timeout_s * (2 + len(batches))
    found = run_ranks(_on_rank, plan.world_size, job, say is not None, timeout_s=timeout_s, limit_s=limit)[0]
    return compare(str(plan), found, wanted, rtol, atol)


def _reference(job: Job, model: nn.Module, timeout_s: float, say: Callable[[str], None] | None) -> Run:
    if has_dropout(model) and model.training:
        return run_ranks(_seeded_rank, 1, job, timeout_s=timeout_s, limit_s=timeout_s * (2 + len(job.batches)))[0]
    return alone(model, job.cast(), job.loaded(), say)


def _seeded_rank(rank: int, world: int, job: Job) -> Run:
    model = job.model()
    torch.manual_seed(job.seed + 1)
    return seeded(model, job.plan, job.cast(), job.loaded())


def _on_rank(rank: int, world: int, job: Job, talks: bool) -> Run:
    model = job.model()
    torch.manual_seed(job.seed + 1)
    say = (lambda text: print(text, flush=True)) if talks else None
    run = together(model, job.plan, job.cast(), job.loaded(), tamper=job.tamper, say=say)
    return run if rank == 0 else Run()


def _here(job: Job, rtol: float, atol: float, say: Callable[[str], None] | None) -> Report:
    """On the ranks of this job: the same report on each."""
    model = job.model()
    if has_dropout(model) and model.training:
        raise ValueError("pypar.verify: a model with dropout needs a reference of its own: call this without torchrun")
    found = together(model, job.plan, job.cast(), job.loaded(), tamper=job.tamper, say=say)
    report: list[Any] = [None]
    if dist.get_rank() == 0:
        wanted = alone(job.model(), job.cast(), job.loaded(), say)
        report = [compare(str(job.plan), found, wanted, rtol, atol)]
    dist.broadcast_object_list(report, 0)
    return report[0]
