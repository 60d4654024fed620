"""Pipeline: the module that users see."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.utils import _pytree as pytree

from pypar.gradients.buckets import set_aside
from pypar.pipeline_parallel.batch import Losses, LossFn, cut_batch, signature, size_of
from pypar.pipeline_parallel.engine import Engine, abort
from pypar.pipeline_parallel.generate import generate
from pypar.pipeline_parallel.generators import make_schedule
from pypar.pipeline_parallel.plan import FORWARD, Link, links, slots_needed
from pypar.pipeline_parallel.ring import Channel, Edge, make_rings
from pypar.pipeline_parallel.schedule import Action, Schedule
from pypar.pipeline_parallel.stage import Stages
from pypar.pipeline_parallel.state import aliases_of, gather, take
from pypar.pipeline_parallel.tied import TiedGradients, find_tied
from pypar.pipeline_parallel.weight_grads import WeightQueue, attach
from pypar.placement import Cut, cut

BROADCAST_BYTES = 250 * 2**20
PROBE = Edge(0, 1, 4, 1 << 16)
SPARE_BYTES = 16 << 10  # in a slot, for heads and for a structure that changed


class Pipeline(nn.Module):
    """Pipeline parallel: every rank holds some consecutive blocks of `module` (one or more stages) and the batch flows
    through the ranks in micro-batches.

    Every rank passes the same full model, which is cut in place, then the same batch to train_step. The model's own
    forward runs on every rank, with the other ranks' modules left out, so that it computes its masks and positions
    itself. What crosses a cut is the output of the block before it, tensors in any nesting.

    module          with an nn.ModuleList or nn.Sequential of blocks; Hugging Face decoder models as they are
    group           the ranks of the pipeline; default all
    schedule        a name (pypar.pipeline_parallel.generators.NAMES), a Schedule, or a function of the number of
                    micro-batches that returns one
    micro_batches   into which a batch is cut; a batch of fewer samples makes fewer
    split           "auto" (equal costs), "balanced" (also inside of blocks), numbers of blocks per stage, or names of
                    the blocks, or of children of them, with which stages begin: see pypar.placement.cut
    num_stages      of schedules with several stages per rank; default as the schedule has it
    carry           names of blocks whose output later stages read as well (skip connections)
    init_sync       rank 0's parameters and buffers go to all ranks first

    Tied weights (embedding and head) stay tied: each rank that uses one holds it, and gets the whole gradient.
    The optimizer is an ordinary one over parameters(), which are this rank's. Dropout depends on the micro-batch and
    the module alone, so that all schedules and splits of a batch give the same numbers.
    Raises ValueError for a module, split or schedule that doesn't fit; RuntimeError, where a stage needs what isn't
    sent to it; pypar.PeerError, on every other rank, when a rank fails, with its message.
    Source: Huang et al., GPipe (2019); Narayanan et al., Megatron-LM (2021); Qi et al., Zero Bubble (2023).
    """

    def __init__(
        self,
        module: nn.Module,
        group: dist.ProcessGroup | None = None,
        *,
        schedule: str | Schedule | Callable[[int], Schedule] = "1f1b",
        micro_batches: int = 8,
        split: str | Sequence[str] | Sequence[int] = "auto",
        num_stages: int | None = None,
        carry: Sequence[str] = (),
        init_sync: bool = True,
    ):
        super().__init__()
        if group is None:
            if not dist.is_initialized():
                raise ValueError("pypar.Pipeline: no process group; call pypar.init() first, or pass group=")
            group = dist.group.WORLD
        assert group is not None
        if micro_batches < 1:
            raise ValueError(f"pypar.Pipeline: micro_batches={micro_batches}; a batch needs one at least")
        self.group, self.rank, self.world_size = group, dist.get_rank(group), dist.get_world_size(group)
        self.micro_batches, self._schedule, self._num_stages = micro_batches, schedule, num_stages
        self._schedules: dict[int, Schedule] = {}
        first = self.schedule_of(micro_batches)
        self.cut: Cut = cut(module, first.num_stages, split)
        self.stages_here = [s for s in range(first.num_stages) if first.rank_of(s) == self.rank]
        self._ranks = first.ranks
        self._last_rank = first.ranks[-1]
        if init_sync and self.world_size > 1:
            tensors = [t.detach() for t in (*module.parameters(), *module.buffers())]
            dist._broadcast_coalesced(group, tensors, BROADCAST_BYTES, 0)
        self.aliases = aliases_of(module)
        self._tied = find_tied(module, self.cut, first.rank_of, self.world_size, self.rank)
        self._tied_gradients = TiedGradients(self._tied, group)
        self._queue = WeightQueue()
        tied = {id(t.parameter): t.parts[0] for t in self._tied if t.parts and t.parameter is not None}
        for part in self.cut.parts:
            if part.stage in self.stages_here:
                second = {key for key, name in tied.items() if name != part.name}
                attach(part.module, self._queue, second)
        self._stages = Stages(module, self.cut, set(self.stages_here), carry)
        config: Any = getattr(module, "config", None)
        if hasattr(config, "use_cache"):
            config.use_cache = False  # of keys and values, which training would only fill
        self.module = module
        self._sized: list[torch.Size] = []  # of micro-batches whose messages fit the rings
        self._bytes: dict[Link, int] = {}  # of the largest message
        self._engines: dict[tuple[int, ...], Engine] = {}
        self._loss_is_sum: bool | None = None
        dist.barrier(group=group)

    # -- public ----------------------------------------------------------------------------------------------------

    def train_step(self, batch: Any, loss_fn: LossFn | None = None) -> torch.Tensor:
        """Forward and backward of the whole batch; the mean loss, on every rank. Gradients add up until zero_grad.

        batch    a pair (inputs, targets): the model gets the inputs and loss_fn(output, targets); or a dict: the model
                 gets the keys that its forward names, and loss_fn(output, batch). The same on every rank
        loss_fn  returns the mean over its micro-batch, which counts by samples, or (sum, count); None: the causal
                 language-model loss of batch["labels"] (shifted inside, -100 ignored), the mean over the batch's tokens
        """
        return self._guarded(lambda: self._train_step(batch, loss_fn))

    @torch.no_grad()
    def eval_step(self, batch: Any, loss_fn: LossFn | None = None) -> torch.Tensor:
        """The mean loss of a batch, as train_step's, without gradient; on every rank."""
        return self._guarded(lambda: self._eval_step(batch, loss_fn))

    @torch.no_grad()
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's output without gradient, on every rank; the same inputs on every rank. To train: train_step."""
        batch = kwargs if kwargs and not args else args
        return self._guarded(lambda: self._evaluate(batch))

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """module.generate(...) of a Hugging Face model, without a cache; the same on every rank."""
        return generate(self.module, self.forward, lambda: self._agree("generate"), *args, **kwargs)

    @torch.no_grad()
    def clip_grad_norm_(self, max_norm: float) -> float:
        """Scales all gradients so that their norm over all ranks is at most max_norm, tied weights counted once;
        returns what it was, the same on every rank. Collective."""
        copies = self.copies()
        squares = torch.zeros((), dtype=torch.float64)
        for parameter in self.parameters():
            if parameter.grad is not None and id(parameter) not in copies:
                squares += torch.linalg.vector_norm(parameter.grad.double()).square()
        dist.all_reduce(squares, group=self.group)
        norm = float(squares.sqrt())
        if norm > max_norm:
            for parameter in self.parameters():
                if parameter.grad is not None:
                    parameter.grad.mul_(max_norm / (norm + 1e-6))
        return norm

    def copies(self) -> set[int]:
        """ids of the tied parameters here that another rank's count for, in a norm for example."""
        return {id(t.parameter) for t in self._tied if t.parameter is not None and t.is_copy(self.rank)}

    def full_state_dict(self) -> dict[str, torch.Tensor]:
        """The module's state_dict as it was before it was cut, on rank 0; empty elsewhere. Collective."""
        return gather(self.module.state_dict(keep_vars=False), self.group)

    def full_optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, torch.Tensor]]:
        """{name of a parameter: its state}, of an optimizer over parameters() of every rank, on rank 0; empty
        elsewhere. Collective."""
        named = self.module.named_parameters()
        mine = {f"{k}.{n}": v for n, p in named for k, v in optimizer.state.get(p, {}).items() if torch.is_tensor(v)}
        found: dict[str, dict[str, torch.Tensor]] = {}
        for full, value in gather(mine, self.group).items():
            key, _, name = full.partition(".")
            found.setdefault(name, {})[key] = value
        return found

    def full_gradients(self) -> dict[str, torch.Tensor]:
        """{name: gradient} of all parameters that have one, on rank 0; empty elsewhere. Collective."""
        mine = {n: p.grad for n, p in self.module.named_parameters(remove_duplicate=False) if p.grad is not None}
        return gather(mine, self.group)

    def load_full_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Takes this rank's part of what full_state_dict() gives, or the model's own state_dict did. Raises ValueError
        for a name or shape that is missing."""
        take(self.module, state)

    def schedule_of(self, micro_batches: int) -> Schedule:
        """The schedule for so many micro-batches. Raises ValueError where there is none."""
        if micro_batches not in self._schedules:
            given = self._schedule
            if isinstance(given, str):
                made = make_schedule(given, self.world_size, micro_batches, self._num_stages)
            elif isinstance(given, Schedule):
                made = given
            else:
                made = given(micro_batches)
            if made.num_ranks != self.world_size or made.micro_batches != micro_batches:
                raise ValueError(
                    f"pypar.Pipeline: schedule '{made.name}' is for {made.num_ranks} ranks and {made.micro_batches} "
                    f"micro-batches; here are {self.world_size} ranks and {micro_batches} micro-batches"
                )
            self._schedules[micro_batches] = made
        return self._schedules[micro_batches]

    # -- steps -----------------------------------------------------------------------------------------------------

    def _guarded(self, run: Callable[[], Any]) -> Any:
        """When this rank fails the others learn why."""
        try:
            return run()
        except BaseException as error:
            abort(self.group, f"rank {self.rank} of the pipeline", error)
            raise

    def _train_step(self, batch: Any, loss_fn: LossFn | None) -> torch.Tensor:
        losses = Losses.of(batch, loss_fn)
        parts = cut_batch(batch, min(self.micro_batches, size_of(batch)))
        return torch.tensor(self.accumulate(parts, losses, self._agree(signature(batch)), self._facts))

    def _facts(self, losses: Losses) -> tuple[float, float, bool]:
        facts = torch.tensor([losses.mean, losses.scale, float(losses.is_sum)], dtype=torch.float64)
        dist.broadcast(facts, group=self.group, group_src=self._last_rank)
        mean, scale, is_sum = facts.tolist()
        return mean, scale, bool(is_sum)

    def accumulate(
        self,
        parts: list[Any],
        losses: Losses,
        seed: int,
        agree: Callable[[Losses], tuple[float, float, bool]],
        done: Callable[[int], None] | None = None,
    ) -> float:
        """Adds the gradients of these micro-batches to param.grad, as train_step does; the mean loss.

        seed: the same on every rank; that of micro-batch i is seed + i. agree: collective, what all ranks make of the
        last one's losses: (mean, factor on the gradients, whether loss_fn returned sums). done(stage): called when all
        gradients of a micro-batch are there in that stage."""
        self._size_rings(parts[0], seed, has_targets=True)
        schedule = self.schedule_of(len(parts))
        engine = self._engine(schedule)
        aside = self._set_aside()
        self._tied_gradients.begin()
        engine.run(schedule, self.rank, parts, losses, lambda micro_batch: seed + micro_batch, done=done)
        mean, scale, self._loss_is_sum = agree(losses)
        self._scale(scale, aside is None)
        self._tied_gradients.end()
        for parameter, grad in (aside or {}).items():
            parameter.grad = grad if parameter.grad is None else grad.add_(parameter.grad)
        return mean

    def _set_aside(self) -> dict[nn.Parameter, torch.Tensor] | None:
        """The gradients of earlier steps, where those of this one may have to be scaled by themselves."""
        if self._loss_is_sum is False:
            return None
        kept = {parameter: set_aside(parameter) for parameter in self.parameters()}
        return {parameter: grad for parameter, grad in kept.items() if grad is not None}

    @torch.no_grad()
    def _scale(self, scale: float, mixed: bool) -> None:
        """mixed: into the gradients of earlier steps."""
        if scale == 1.0:
            return
        if mixed:
            raise ValueError("loss_fn returned a mean in the step before and (sum, count) now; keep to one of them")
        for parameter in self.parameters():
            for grad in (parameter.grad, getattr(parameter, "_pypar_second_grad", None)):
                if grad is not None:
                    grad.mul_(scale)

    def _evaluate(self, batch: Any) -> Any:
        parts = cut_batch(batch, min(self.micro_batches, size_of(batch)))
        seed = self._agree(signature(batch))
        self._size_rings(parts[0], seed, has_targets=False)
        engine = self._forward_only(parts, None, seed, has_targets=False)
        outputs = [engine.outputs[i] for i in range(len(parts))] if self.rank == self._last_rank else []
        return self._from_last(outputs)

    def _eval_step(self, batch: Any, loss_fn: LossFn | None) -> torch.Tensor:
        losses = Losses.of(batch, loss_fn)
        parts = cut_batch(batch, min(self.micro_batches, size_of(batch)))
        self.evaluate(parts, losses, self._agree(signature(batch)))
        return torch.tensor(self._facts(losses)[0])

    def evaluate(self, parts: list[Any], losses: Losses, seed: int) -> None:
        """The losses of micro-batches, which the rank of the last stage knows then."""
        self._size_rings(parts[0], seed, has_targets=True)
        self._forward_only(parts, losses, seed, has_targets=True)

    @property
    def is_last(self) -> bool:
        """Whether the last stage is here."""
        return self.rank == self._last_rank

    def _forward_only(self, parts: list[Any], losses: Losses | None, seed: int, has_targets: bool) -> Engine:
        """A stage runs all micro-batches before the next one of its rank."""
        count = len(parts)
        everyone = tuple(
            tuple(Action(s, "F", i) for s in range(self.cut.num_stages) if self._rank_of(s) == r for i in range(count))
            for r in range(self.world_size)
        )
        schedule = Schedule("forward", self.world_size, count, self._ranks, everyone)
        engine = self._engine(self.schedule_of(self.micro_batches))
        engine.run(schedule, self.rank, parts, losses, lambda i: seed + i, has_targets, trains=False)
        return engine

    def _from_last(self, outputs: list[Any]) -> Any:
        """The outputs of the micro-batches joined, on every rank."""
        whole: list[Any] = [None]
        if outputs:
            leaves = [pytree.tree_flatten(each) for each in outputs]
            joined = [
                torch.cat(each) if isinstance(each[0], torch.Tensor) and each[0].dim() else each[0]
                for each in zip(*(flat for flat, _ in leaves), strict=True)
            ]
            whole = [pytree.tree_unflatten(joined, leaves[0][1])]
        dist.broadcast_object_list(whole, group=self.group, group_src=self._last_rank)
        return whole[0]

    def _rank_of(self, stage: int) -> int:
        return self._ranks[stage]

    def _agree(self, what: str) -> int:
        """The ranks hold the same batch, and start from one number, which rank 0 draws from torch's default generator
        (every rank draws one). Raises ValueError where their batches differ in shape."""
        drawn = torch.randint(1 << 40, (1,), dtype=torch.int64)
        if self.world_size == 1:
            return int(drawn)
        mine = torch.tensor([int(drawn), hash_of(what)], dtype=torch.int64)
        everyone = [torch.empty_like(mine) for _ in range(self.world_size)]
        dist.all_gather(everyone, mine, group=self.group)
        wrong = [r for r, theirs in enumerate(everyone) if theirs[1] != everyone[0][1]]
        if wrong:
            raise ValueError(
                f"pypar.Pipeline, rank {self.rank}: ranks {wrong} have another batch than rank 0; here it is {what}. "
                "Every rank of a pipeline takes the same batch"
            )
        return int(everyone[0][0])

    # -- rings -----------------------------------------------------------------------------------------------------

    def _size_rings(self, part: Any, seed: int, has_targets: bool) -> None:
        """Runs the largest micro-batch forward once, without gradient, where its messages may be larger than known
        ones, so that each fits a slot."""
        shapes = torch.Size(
            n for leaf in pytree.tree_leaves(part) if isinstance(leaf, torch.Tensor) for n in (*leaf.shape, -1)
        )
        if any(len(s) == len(shapes) and all(a >= b for a, b in zip(s, shapes, strict=True)) for s in self._sized):
            return
        self._sized.append(shapes)
        schedule = self.schedule_of(self.micro_batches)
        all_links = links(schedule)
        edges = [Edge(self._rank_of(k.stage), self._rank_of(k.target), PROBE.num_slots, PROBE.slot_bytes)
                 for k in all_links]  # fmt: skip
        channels = {all_links[i]: Channel(ring) for i, ring in make_rings(edges, self.group).items()}
        engine = Engine(self._stages, self._queue, channels, copies=True)
        row = tuple(Action(stage, "F", 0) for stage in self.stages_here)
        rows = tuple(row if r == self.rank else () for r in range(self.world_size))
        probe = Schedule("probe", self.world_size, 1, schedule.ranks, rows)
        modes = {m: m.training for m in self.module.modules()}
        self.module.eval()
        try:
            engine.run(probe, self.rank, [part], None, lambda _: seed, has_targets)
        finally:
            for module, mode in modes.items():
                module.training = mode
        mine = {link: channel.most_bytes for link, channel in channels.items() if channel.most_bytes}
        everyone: list[Any] = [None] * self.world_size
        dist.all_gather_object(everyone, mine, group=self.group)
        for found in everyone:
            for link, nbytes in found.items():
                self._bytes[link] = max(self._bytes.get(link, 0), nbytes)
        self._engines.clear()

    def _engine(self, schedule: Schedule) -> Engine:
        """With rings that the schedule needs. Collective when it is the first of its kind."""
        holds = True
        slots = slots_needed(schedule, holds=True)
        if slots is None:
            holds, slots = False, slots_needed(schedule, holds=False)
        if slots is None:
            raise ValueError(f"pypar.Pipeline: schedule '{schedule.name}' needs more than 64 messages under way")
        key = (schedule.micro_batches,)
        if key not in self._engines:
            edges = []
            for link, count in slots.items():
                sizes = self._bytes.get(link if link.direction == FORWARD else Link(link.target, FORWARD), 0)
                edges.append(Edge(self._rank_of(link.stage), self._rank_of(link.target), count, sizes + SPARE_BYTES))
            rings = make_rings(edges, self.group)
            order = list(slots)
            self._engines[key] = Engine(
                self._stages, self._queue, {order[i]: Channel(ring) for i, ring in rings.items()}, copies=not holds
            )
        return self._engines[key]


def hash_of(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest(), "little")
