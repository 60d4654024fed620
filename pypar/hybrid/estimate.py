"""estimate: memory of every rank and bytes that it sends per step, before a run."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pypar.hybrid.dry_step import Stage, dry_step, shapes_of
from pypar.hybrid.holdings import CONTROL, OptimizerCost, buffer_bytes, gradients_of, held, sent
from pypar.hybrid.plan import Plan, PlanError
from pypar.hybrid.traffic import Count
from pypar.pipeline_parallel.batch import LossFn, cut_batch, size_of

MOST_ROWS = 32  # of a table or a chart
KINDS = ("parameters", "gradients", "optimizer", "activations", "buffers")


@dataclass(frozen=True)
class RankEstimate:
    """memory: bytes by kind (KINDS), when they are the most together; of what ranks of a host share, its part. settled:
    the same behind optimizer.step(). sent: bytes per step by axis ("pp", "dp", "tp", "all") and op."""

    rank: int
    pp_rank: int
    dp_rank: int
    tp_rank: int
    memory: dict[str, int]
    settled: dict[str, int]
    sent: dict[str, dict[str, int]]
    host_parameters: int

    @property
    def memory_bytes(self) -> int:
        return sum(self.memory.values())

    @property
    def settled_bytes(self) -> int:
        return sum(self.settled.values())

    @property
    def sent_bytes(self) -> int:
        return sum(count for ops in self.sent.values() for count in ops.values())


@dataclass(frozen=True)
class Estimate:
    """ranks: of the job, in their order. str() is a table."""

    plan: Plan
    ranks: tuple[RankEstimate, ...]
    num_parameters: int

    def table(self) -> str:
        """A row per rank: memory by kind, then bytes sent by axis, in MB. Of many ranks those that are alike share
        one."""
        axes = [axis for axis in ("pp", "dp", "tp", CONTROL) if any(axis in rank.sent for rank in self.ranks)]
        head = ["rank", "pp dp tp", *KINDS, "memory", *(f"sends {axis}" for axis in axes), "sends"]
        rows = [head]
        for each, label in self.rows(MOST_ROWS):
            rows.append(
                [
                    label, f"{each.pp_rank} {each.dp_rank} {each.tp_rank}",
                    *(_mb(each.memory[kind]) for kind in KINDS), _mb(each.memory_bytes),
                    *(_mb(sum(each.sent.get(axis, {}).values())) for axis in axes), _mb(each.sent_bytes),
                ]
            )  # fmt: skip
        widths = [max(len(row[n]) for row in rows) for n in range(len(head))]
        lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
        most = max(self.ranks, key=lambda rank: rank.memory_bytes)
        lines += ["", f"MB of 10^6 bytes; {self.num_parameters / 1e6:.1f} million parameters; plan {self.plan}"]
        lines += [f"most memory: rank {most.rank}, {_mb(most.memory_bytes)} MB"]
        if self.plan.zero and self.plan.dp > 1:
            lines += [
                f"parameters exist once for the ranks of a host that share them: {_mb(most.host_parameters)} MB there, "
                f"of which {_mb(most.memory['parameters'])} count for each; all ranks on one host"
            ]
        return "\n".join(lines)

    def rows(self, most: int) -> list[tuple[RankEstimate, str]]:
        """(rank, how it is called), of more than `most` ranks one for all that are alike."""
        if len(self.ranks) <= most:
            return [(rank, str(rank.rank)) for rank in self.ranks]
        alike: dict[str, list[RankEstimate]] = {}
        for rank in self.ranks:
            alike.setdefault(f"{rank.memory} {rank.sent}", []).append(rank)
        return [(r[0], f"{r[0].rank}" + (f" and {len(r) - 1} like it" if r[1:] else "")) for r in alike.values()]

    def __str__(self) -> str:
        return self.table()

    def to_json(self) -> str:
        """{"plan": text, "parameters": number, "ranks": [{"rank", "pp", "dp", "tp", "memory", "settled", "sent"}]},
        in bytes."""
        ranks = [
            {
                "rank": r.rank, "pp": r.pp_rank, "dp": r.dp_rank, "tp": r.tp_rank, "memory": r.memory,
                "settled": r.settled, "sent": r.sent, "host_parameters": r.host_parameters,
            }
            for r in self.ranks
        ]  # fmt: skip
        return json.dumps({"plan": str(self.plan), "parameters": self.num_parameters, "ranks": ranks}, indent=1)

    def chart(self, path: str | Path) -> Path:
        """PNG, SVG or PDF, by the ending: two bars per rank, memory by kind and bytes sent by axis. Needs
        matplotlib."""
        from pypar.hybrid.estimate_chart import picture

        return picture(self, Path(path))


def estimate(
    module: nn.Module,
    plan: Plan | str | dict[str, Any],
    batch: Any,
    *,
    optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.AdamW,
    loss_fn: LossFn | None = None,
    **settings: Any,
) -> Estimate:
    """What each rank of `plan` would hold at most, and would send in a step (train_step and optimizer.step, without
    clipping, from the second one on). Starts no ranks, and computes nothing: the step runs on tensors without values.

    module     the full one, as pypar.parallelize takes it; may be on the meta device. Nothing of it is changed
    plan       a Plan, its text or its fields
    batch      a global batch, of which shapes and types count (meta tensors serve), as train_step takes it; or the
               shape (samples, tokens) of a language model's {"input_ids", "labels"}
    optimizer, settings, loss_fn
               as pypar.parallelize and train_step take them

    All ranks are taken to be on one host, where they share memory. memory is what tensors need: a process has the
    interpreter, the libraries and what its allocator keeps besides. Bytes sent count as pypar.hybrid.traffic.Traffic
    counts them, exactly, while every parameter gets a gradient in each step.
    Raises PlanError as pypar.parallelize; ValueError for a batch that has too few samples, or where the module or
    loss_fn looks at values.
    """
    plan = Plan.of(plan)
    plan.check(None, module)
    batch = _batch(batch)
    samples = size_of(batch)
    if samples < plan.dp:
        raise ValueError(f"a batch of {samples} samples for dp={plan.dp}: every rank of that axis needs one at least")
    shares = cut_batch(batch, plan.dp)
    least = size_of(shares[-1])
    dry = _Dry(module, plan, shares, loss_fn, least)
    made = OptimizerCost.of(optimizer, settings, _step_type(module, plan))
    ranks = tuple(_rank(number, plan, dry, made) for number in range(plan.world_size))
    return Estimate(plan, ranks, sum(p.numel() for p in module.parameters()))


class _Dry:
    """Dry steps, one for all ranks that do the same."""

    def __init__(self, module: nn.Module, plan: Plan, shares: Sequence[Any], loss_fn: LossFn | None, least: int):
        self.module, self.plan, self.shares, self.loss_fn, self.least = module, plan, shares, loss_fn, least
        self.num_parts = min(plan.micro_batches, least)
        self._known: dict[tuple[int, Any], list[Stage]] = {}
        self._shapes = [shapes_of(module, plan, rank) for rank in range(plan.tp)] if plan.tp > 1 else [()]

    def __call__(self, pp_rank: int, dp_rank: int, tp_rank: int) -> Stage:
        samples = size_of(self.shares[dp_rank])
        rows_differ = self.plan.sequence_parallel and bool(samples % (self.num_parts * self.plan.tp))
        key = samples, tp_rank if rows_differ else self._shapes[tp_rank]
        if key not in self._known:
            self._known[key] = dry_step(
                self.module, self.plan, self.shares[dp_rank], tp_rank, self.loss_fn, self.least,
                gradients_of(self.plan, self.num_parts),
            )  # fmt: skip
        return self._known[key][pp_rank]


def _rank(number: int, plan: Plan, dry: _Dry, cost: OptimizerCost) -> RankEstimate:
    at, left = {}, number
    for axis in reversed(plan.order):
        left, at[axis] = divmod(left, getattr(plan, axis))
    stage = dry(at["pp"], at["dp"], at["tp"])
    has = held(stage, plan, at["dp"], cost)
    buffers = buffer_bytes(stage.module) + stage.ring_bytes
    in_buckets = bool(plan.zero) or plan.dp > 1  # behind the step
    settled_gradients = has.gradients + (0 if in_buckets else stage.whole_gradients)
    settled = _kinds(has.parameters, settled_gradients, has.optimizer, 0, buffers)
    moments = [(stage.activations, stage.gradients), (0, stage.whole_gradients), (has.step, stage.whole_gradients)]
    activations, gradients = max(moments, key=sum)
    memory = _kinds(has.parameters, has.gradients + gradients, has.optimizer, activations, buffers)
    counts: dict[tuple[str, str], Count] = dict(stage.sent)
    for key, count in sent(stage, plan, at["dp"], dry.num_parts).items():
        counts[key] = counts.get(key, 0) + count
    by_axis: dict[str, dict[str, int]] = {}
    for (axis, op), count in sorted(counts.items()):
        if count:
            by_axis.setdefault(axis, {})[op] = int(count)
    return RankEstimate(number, at["pp"], at["dp"], at["tp"], memory, settled, by_axis, has.host_parameters)


def _kinds(*values: int) -> dict[str, int]:
    return dict(zip(KINDS, values, strict=True))


def _step_type(module: nn.Module, plan: Plan) -> torch.dtype:
    """Of what the optimizer steps."""
    own = next((p.dtype for p in module.parameters() if p.requires_grad), torch.float32)
    return torch.float32 if plan.precision == "bfloat16" or (plan.zero and own.itemsize < 4) else own


def _batch(batch: Any) -> Any:
    is_shape = isinstance(batch, (tuple, list, torch.Size)) and len(batch) == 2
    if is_shape and all(isinstance(n, int) for n in batch):
        samples, tokens = batch
        if samples < 1 or tokens < 1:
            raise ValueError(f"a batch of shape {tuple(batch)}: give samples and tokens, both 1 or more")
        ids = torch.empty(samples, tokens, dtype=torch.int64, device="meta")
        return {"input_ids": ids, "labels": ids}
    return batch


def _mb(num_bytes: float) -> str:
    return f"{num_bytes / 1e6:.2f}" if num_bytes < 1e8 else f"{num_bytes / 1e6:.0f}"


__all__ = ["CONTROL", "Estimate", "PlanError", "RankEstimate", "estimate"]
