"""verify: starts the ranks, runs the same steps there and in one process, and compares."""

from __future__ import annotations

import dataclasses
import pickle
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.utils import _pytree as pytree

from pypar import user_file
from pypar.hybrid import HybridModel, HybridOptimizer, Plan
from pypar.pipeline_parallel.batch import LossFn
from pypar.testing import run_ranks
from pypar.verify.report import Report, compare
from pypar.verify.seeded import has_dropout, seeded, set_dropout
from pypar.verify.steps import DrawsRandomError, Run, Settings, alone, default_options, together

TOLERANCES = {torch.float64: (1e-10, 1e-10)}
FLOAT32 = (1e-5, 1e-6)


@dataclass
class Job:
    """model_fn: makes the model (and batch, and loss), or FILE.py:FUNCTION. batches: steps x accumulate of them."""

    model_fn: Callable[[], Any] | str
    plan: Plan
    batches: list[Any]
    settings: Settings
    dtype: torch.dtype | None
    seed: int
    freeze: tuple[str, ...] = ()
    dropout: float | None = None
    tamper: Callable[[HybridModel, HybridOptimizer], None] | None = None

    def ready(self) -> tuple[nn.Module, Settings]:
        """(model, settings with the loss of the user's function or file, which need not be one that can be sent to the
        ranks): the same in every process. Raises ValueError where the model is not."""
        first, second = self.made(), self.made()
        ours, theirs = ({**dict(m.model.named_parameters()), **dict(m.model.named_buffers())} for m in (first, second))
        for name in dict.fromkeys([*ours, *theirs]):
            a, b = ours.get(name), theirs.get(name)
            if a is None or b is None or not _same(a, b):
                raise ValueError(
                    f"pypar.verify: the model is another one each time that it is made ({name}), though torch's seed "
                    "is the same; draw its weights from torch's default generator"
                )
        loss_fn = self.settings.loss_fn or first.loss_fn
        if loss_fn is None and isinstance(self.model_fn, str):
            loss_fn = getattr(user_file.load(self.model_fn)[0], "loss_fn", None)
        return first.model, dataclasses.replace(self.settings, loss_fn=loss_fn)

    def made(self) -> user_file.Made:
        torch.manual_seed(self.seed)
        if isinstance(self.model_fn, str):
            made = user_file.made(self.model_fn, user_file.load(self.model_fn)[1])
        else:
            made = user_file.made(getattr(self.model_fn, "__name__", type(self.model_fn).__name__), self.model_fn)
        model, named = made.model, list(made.model.named_parameters())
        for pattern in self.freeze:
            found = [parameter for name, parameter in named if pattern in name]
            if not found:
                raise ValueError(f"freeze: no parameter has {pattern!r} in its name; there is {named[0][0]}, say")
            for parameter in found:
                parameter.requires_grad_(False)
        if not any(parameter.requires_grad for _, parameter in named):
            raise ValueError("the model has no parameter that is trained" + (": freeze less" if self.freeze else ""))
        if self.dropout is not None:
            set_dropout(model, self.dropout)
        made.model = model if self.dtype is None else model.to(self.dtype)
        return made

    def cast(self) -> list[Any]:
        """The batches, in the type of the model."""

        def to(leaf: Any) -> Any:
            is_float = isinstance(leaf, torch.Tensor) and leaf.is_floating_point()
            return leaf.to(self.dtype) if is_float and self.dtype is not None else leaf

        return [pytree.tree_map(to, batch) for batch in self.batches]

    def check_can_be_sent(self) -> None:
        """Raises ValueError for a function that the ranks' processes can't import."""
        for what, function in (
            ("model_fn", self.model_fn), ("loss_fn", self.settings.loss_fn),
            ("optimizer", self.settings.optimizer), ("tamper", self.tamper),
        ):  # fmt: skip
            try:
                pickle.dumps(function)
            except Exception as error:
                raise ValueError(
                    f"{what} can't be sent to the ranks ({error}): use a function at the top level of a module, "
                    "FILE.py:FUNCTION, or for the loss a model_fn that returns (model, batch, loss_fn)"
                ) from error


def verify(
    model_fn: Callable[[], Any] | str,
    plan: Plan | str,
    batch: Any = None,
    *,
    loss_fn: LossFn | None = None,
    optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.AdamW,
    options: dict[str, Any] | None = None,
    steps: int = 3,
    clip: float | None = None,
    accumulate: int = 1,
    freeze: Sequence[str] = (),
    dropout: float | None = None,
    dtype: torch.dtype | None = None,
    rtol: float | None = None,
    atol: float | None = None,
    seed: int = 0,
    timeout_s: float = 300.0,
    say: Callable[[str], None] | None = None,
    tamper: Callable[[HybridModel, HybridOptimizer], None] | None = None,
) -> Report:
    """Holds a model under a plan against one process: loss, every gradient, every updated weight of a few steps.

    model_fn    makes the full model, or (model, batch), or (model, batch, loss_fn); a function on a module's top level,
                which every process calls, or "FILE.py:FUNCTION", whose file may have a loss_fn as well
    plan        a Plan, or its text
    batch       the global batch, as train_step takes it, for every step; or a list of steps x accumulate of them;
                default: model_fn's
    optimizer, options
                a class of torch.optim and its settings; default AdamW with lr=1e-3, and eps=1e-5 where the class has
                an eps, so that gradients which are nothing but rounding don't become steps
    clip        the largest norm of the gradients
    freeze      parts of the names of parameters that are not trained
    dropout     a rate for every dropout of the model
    dtype       torch.float64 settles what float32 leaves in doubt
    rtol, atol  default 1e-5 and 1e-6, with float64 1e-10
    timeout_s   of the ranks' waits
    say         gets a line after each step
    tamper      for tests: called with the model and the optimizer on each rank, before the first step

    The ranks are processes of this host; where a process group is there already (torchrun), its ranks are used, and all
    of them call this. A model with dropout, or that draws other random numbers in its forward, is held against one
    process that draws the plan's.
    Raises PlanError for an illegal plan; ValueError for a model that isn't the same each time, a number of batches that
    isn't steps x accumulate, and functions that can't be sent to the ranks; what the model or the loss raises in one
    process; RankFailed with every rank's traceback when one fails.
    """
    plan = Plan.of(plan)
    options = default_options(optimizer) if options is None else options
    settings = Settings(optimizer, options, clip, accumulate, loss_fn)
    job = Job(model_fn, plan, [], settings, dtype, seed, tuple(freeze), dropout, tamper)
    job.batches = _batches(job.made().batch if batch is None else batch, steps, accumulate)
    tolerance = TOLERANCES.get(dtype, FLOAT32) if dtype is not None else FLOAT32
    rtol, atol = tolerance[0] if rtol is None else rtol, tolerance[1] if atol is None else atol
    if dist.is_initialized():
        return _here(job, rtol, atol, say)
    job.check_can_be_sent()
    model, ready = job.ready()
    plan.check(None, model)
    wanted = _reference(job, model, ready, timeout_s, say)
    limit = timeout_s * (2 + len(job.batches))
    found = run_ranks(_on_rank, plan.world_size, job, say is not None, timeout_s=timeout_s, limit_s=limit)[0]
    return compare(str(plan), found, wanted, rtol, atol)


def _reference(
    job: Job, model: nn.Module, settings: Settings, timeout_s: float, say: Callable[[str], None] | None
) -> Run:
    if not (has_dropout(model) and model.training):
        try:
            return alone(model, job.cast(), settings, say)
        except DrawsRandomError:
            pass
    if say is not None:
        say("the model draws random numbers: one process draws those of the plan")
    return run_ranks(_seeded_rank, 1, job, timeout_s=timeout_s, limit_s=timeout_s * (2 + len(job.batches)))[0]


def _seeded_rank(rank: int, world: int, job: Job) -> Run:
    model, settings = job.ready()
    torch.manual_seed(job.seed + 1)
    return seeded(model, job.plan, job.cast(), settings)


def _on_rank(rank: int, world: int, job: Job, talks: bool) -> Run:
    model, settings = job.ready()
    torch.manual_seed(job.seed + 1)
    say = (lambda text: print(text, flush=True)) if talks else None
    run = together(model, job.plan, job.cast(), settings, tamper=job.tamper, say=say)
    return run if rank == 0 else Run()


def _here(job: Job, rtol: float, atol: float, say: Callable[[str], None] | None) -> Report:
    """On the ranks of this job: the same report on each, or the same error."""
    model, settings = job.ready()
    own = "pypar.verify: a model that draws random numbers needs a reference of its own: call this without torchrun"
    if has_dropout(model) and model.training:
        raise ValueError(own)
    found = together(model, job.plan, job.cast(), settings, tamper=job.tamper, say=say)
    result: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            wanted = alone(job.made().model, job.cast(), settings, say)
            result = [compare(str(job.plan), found, wanted, rtol, atol)]
        except DrawsRandomError:
            result = [ValueError(own)]
        except Exception as error:  # the other ranks wait for the report
            result = [RuntimeError(f"in one process: {type(error).__name__}: {error}")]
    dist.broadcast_object_list(result, 0)
    if isinstance(result[0], Exception):
        raise result[0]
    return result[0]


def _batches(batch: Any, steps: int, accumulate: int) -> list[Any]:
    """steps x accumulate of them. Raises ValueError for another number, so that nothing passes that was not run."""
    if steps < 1 or accumulate < 1:
        raise ValueError(f"steps={steps}, accumulate={accumulate}: 1 or more each")
    if batch is None:
        raise ValueError("no batch: give one, or a model_fn that returns (model, batch)")
    is_list = isinstance(batch, list) and all(isinstance(each, (Mapping, tuple, list)) for each in batch)
    if not is_list:
        return [batch] * (steps * accumulate)
    if len(batch) != steps * accumulate:
        raise ValueError(
            f"a list of {len(batch)} batches, but {steps} steps of {accumulate} need {steps * accumulate}; "
            "a batch that is a pair (inputs, targets) is a tuple"
        )
    return list(batch)


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(torch.nan_to_num(a), torch.nan_to_num(b))
