"""HybridModel: a module that is shared out over the axes of a plan, with the same calls for every plan."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from pypar.data_parallel import DataParallel
from pypar.gradients.buckets import set_aside
from pypar.hybrid.agree import agree
from pypar.hybrid.axes import Axes
from pypar.hybrid.loss import entropy_of
from pypar.hybrid.norm import Norm
from pypar.hybrid.plan import Plan
from pypar.hybrid.shards import ShardsAside, stage_of_buckets
from pypar.pipeline_parallel import Pipeline
from pypar.pipeline_parallel.batch import Caller, Losses, LossFn, cut_batch
from pypar.pipeline_parallel.engine import abort
from pypar.zero import Zero

_BITS = 48
_SEEDED = 0x5051 << _BITS  # the upper bits of the seed of a forward without a pipeline


class HybridModel(nn.Module):
    """What pypar.parallelize returns. `module` is the inner one, cut for this rank; its parameters have the names of
    the full model.

    train_step and eval_step are the same for every plan. Without a pipeline the plain loop works too: forward, a loss,
    backward, optimizer.step(); its loss is this rank's, and gradients are averaged over the data axis.
    """

    def __init__(
        self,
        module: nn.Module,
        plan: Plan,
        axes: Axes,
        pipeline: Pipeline | None,
        data: DataParallel | Zero | None,
        norm: Norm,
        trained: dict[str, tuple[int, ...]],
        aliases: dict[str, str],
    ):
        """Of the full model, trained: shapes of the trained parameters; aliases: second names of tied ones."""
        super().__init__()
        self.trained, self.aliases = trained, aliases
        self.module, self.plan, self.axes = module, plan, axes
        # Not registered: the inner module's parameters keep their names, and are there once.
        self.__dict__["pipeline"], self.__dict__["_data"] = pipeline, data
        self._norm = norm
        self._entropy = entropy_of(module, axes.tp_group)
        self._call = Caller(module, self.forward)
        double = any(p.dtype == torch.float64 for p in module.parameters())
        self._dtype = torch.float64 if double else torch.float32  # of losses
        self._is_sum: bool | None = None  # in a pipeline: loss_fn returns (sum, count), as far as is known
        self._by_stage: dict[int, list[Any]] = {}
        if pipeline is not None and isinstance(data, Zero) and data.stage > 1 and plan.reduce != "once":
            self._by_stage = stage_of_buckets(data, pipeline.cut, set(pipeline.stages_here))

    pipeline: Pipeline | None
    _data: DataParallel | Zero | None

    @property
    def mesh(self) -> Any:
        """The DeviceMesh of the plan."""
        return self.axes.mesh

    @property
    def zero(self) -> Zero | None:
        return self._data if isinstance(self._data, Zero) else None

    # -- public ----------------------------------------------------------------------------------------------------

    def local_batch(self, batch: Any) -> Any:
        """This rank's share of a global batch: of every tensor that has dims, its part of dim 0; the first shares are
        larger where they can't be equal."""
        return cut_batch(batch, self.axes.dp)[self.axes.dp_rank]

    def train_step(self, batch: Any, loss_fn: LossFn | None = None) -> torch.Tensor:
        """Forward and backward of this rank's share of the batch, in micro-batches; the mean loss over the global
        batch, the same on every rank. Gradients add up until zero_grad. Collective of all ranks.

        batch    a pair (inputs, targets): the model gets the inputs and loss_fn(output, targets); or a dict: the model
                 gets the keys that its forward names, and loss_fn(output, batch). The same on all ranks of one share
        loss_fn  returns the mean over its micro-batch, which counts by samples, or (sum, count); None: the causal
                 language-model loss of batch["labels"] (shifted inside, -100 ignored), the mean over all its tokens
        Raises ValueError for a batch or a loss that doesn't fit; pypar.PeerError, on every other rank, when one fails.
        """
        return self.guarded(lambda: self._train_step(batch, loss_fn))

    @torch.no_grad()
    def eval_step(self, batch: Any, loss_fn: LossFn | None = None) -> torch.Tensor:
        """The mean loss over the global batch, as train_step's, without gradient; on every rank."""
        return self.guarded(lambda: self._eval_step(batch, loss_fn))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's output; with a pipeline without gradient, on every rank."""
        if self.pipeline is not None:
            with self._whole():
                return self.pipeline(*args, **kwargs)
        return (self.module if self._data is None else self._data)(*args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """module.generate(...) of a Hugging Face model, the same on every rank of a share."""
        with self._whole():
            return (self.module if self.pipeline is None else self.pipeline).generate(*args, **kwargs)  # type: ignore[operator]

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Of the plain loop: backward passes whose forward ran in here only add up locally."""
        with nullcontext() if self._data is None else self._data.no_sync():
            yield

    # -- what the optimizer asks for -------------------------------------------------------------------------------

    def gradient_norm(self) -> float:
        return self._norm(self.zero)

    def scale_gradients(self, factor: float) -> None:
        if self.zero is not None:
            self.zero.optimizer.scale_grads(factor)
            return
        for parameter in self.module.parameters():
            if parameter.grad is not None:
                parameter.grad.mul_(factor)

    def forget_gradients(self) -> None:
        for parameter in self.module.parameters():
            parameter.grad = None

    def guarded(self, run: Callable[[], Any]) -> Any:
        """When this rank fails the others learn why, whatever group they wait in."""
        try:
            return run()
        except BaseException as error:
            axes = self.axes
            groups = [axes.pp_group, axes.tp_group, axes.dp_group, axes.shard_group, axes.replicate_group]
            for group in dict.fromkeys([*groups, dist.group.WORLD]):
                if group is not None:
                    abort(group, f"rank {dist.get_rank()} ({axes})", error)
            raise

    # -- steps -----------------------------------------------------------------------------------------------------

    def _train_step(self, batch: Any, loss_fn: LossFn | None) -> torch.Tensor:
        parts, losses, seed = self._begin(batch, loss_fn)
        run = self._plain_step if self.pipeline is None else self._pipeline_step
        return torch.tensor(run(parts, losses, seed), dtype=self._dtype)

    def _begin(self, batch: Any, loss_fn: LossFn | None) -> tuple[list[Any], Losses, int]:
        """(micro-batches, losses, seed of the first one). Every share has as many, so that a micro-batch has one number
        among all, by which it is seeded: whatever the layout, dropout is the same where the pieces are."""
        losses = Losses.of(batch, loss_fn)
        facts = agree(batch, loss_fn is None, self.axes)
        losses.num_samples, losses.factor, losses.entropy = facts.samples, float(self.axes.dp), self._entropy
        losses.total = None if losses.total is None else float(facts.tokens)
        parts = cut_batch(batch, min(self.plan.micro_batches, facts.least))
        return parts, losses, facts.seed + self.axes.dp_rank * len(parts)

    def _all(self, losses: Losses) -> tuple[float, float, bool]:
        """(mean over the global batch, factor on this step's gradients, whether loss_fn returns sums). Collective."""
        facts = torch.tensor([losses.value, losses.count, float(losses.is_sum)], dtype=torch.float64)
        has_loss = self.pipeline is None or self.pipeline.is_last
        if not has_loss or self.axes.tp_rank != 0:
            facts.zero_()
        if self.plan.world_size > 1:
            dist.all_reduce(facts)
        value, count, sums = facts.tolist()
        return value / count if count else 0.0, self.axes.dp / count if sums and count else 1.0, bool(sums)

    def _plain_step(self, parts: list[Any], losses: Losses, seed: int) -> float:
        aside: dict[nn.Parameter, torch.Tensor] = {}
        mean = 0.0
        for index, part in enumerate(parts):
            is_last = index == len(parts) - 1
            with nullcontext() if is_last else self.no_sync():
                with seeded(seed + index, self.training):
                    loss = losses.add(self._call(part), part)
                if losses.is_sum and index == 0:
                    aside = self._set_aside()
                if is_last:
                    mean, scale, _ = self._all(losses)
                    if losses.is_sum:
                        self._scale_local(scale, aside)
                        loss = loss * scale
                loss.backward()
        return mean

    def _set_aside(self) -> dict[nn.Parameter, torch.Tensor]:
        """Gradients of earlier steps, which the factor of this one does not concern."""
        kept = {parameter: set_aside(parameter) for parameter in self.module.parameters()}
        return {parameter: grad for parameter, grad in kept.items() if grad is not None}

    @torch.no_grad()
    def _scale_local(self, scale: float, aside: dict[nn.Parameter, torch.Tensor]) -> None:
        for parameter in self.module.parameters():
            if parameter.grad is not None:
                parameter.grad.mul_(scale)
            if parameter in aside:
                kept = aside[parameter]
                parameter.grad = kept if parameter.grad is None else parameter.grad.add_(kept)

    def _pipeline_step(self, parts: list[Any], losses: Losses, seed: int) -> float:
        assert self.pipeline is not None
        reducer = None if self._data is None else self._data._reducer
        shards = ShardsAside(reducer) if self._by_stage and self._is_sum is not False else None
        scales = [1.0]

        def all_ranks(found: Losses) -> tuple[float, float, bool]:
            mean, scale, self._is_sum = self._all(found)
            scales[0] = scale
            return mean, scale, self._is_sum

        def done(stage: int) -> None:
            if reducer is not None:
                reducer.reduce_now(self._by_stage[stage], ends=False)

        if reducer is not None:
            reducer.sync = False
        with self._whole():
            mean = self.pipeline.accumulate(parts, losses, seed, all_ranks, done if self._by_stage else None)
        if shards is not None:
            shards.join(scales[0])
        if reducer is not None:
            early = {id(bucket) for buckets in self._by_stage.values() for bucket in buckets}
            reducer.reduce_now([bucket for bucket in reducer.buckets if id(bucket) not in early])
        return mean

    def _eval_step(self, batch: Any, loss_fn: LossFn | None) -> torch.Tensor:
        parts, losses, seed = self._begin(batch, loss_fn)
        if self.pipeline is not None:
            with self._whole():
                self.pipeline.evaluate(parts, losses, seed)
        else:
            for index, part in enumerate(parts):
                with seeded(seed + index, self.training):
                    losses.add(self._call(part), part)
        return torch.tensor(self._all(losses)[0], dtype=self._dtype)

    def _whole(self) -> AbstractContextManager[None]:
        """While a pipeline runs every parameter is there: micro-batches come too thick for gathering each time."""
        return nullcontext() if self.zero is None else self.zero.whole()


@contextmanager
def seeded(seed: int, draws: bool) -> Iterator[None]:
    """Within the block torch's default generator begins at `seed`, so that what is drawn there depends on the
    micro-batch alone; afterwards it goes on where it was."""
    if not draws:
        yield
        return
    state = torch.default_generator.get_state()
    torch.default_generator.manual_seed(_SEEDED | seed)
    try:
        yield
    finally:
        torch.default_generator.set_state(state)
