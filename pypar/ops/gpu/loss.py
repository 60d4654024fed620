"""The loss over a sharded vocabulary, of CUDA tensors: triton_kernels where all ranks reach each other's memory.

The reference, over the process group, elsewhere: for float64 logits, without Triton, and for determinism "layout".
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.distributed as dist

from pypar.ops.gpu import collectives
from pypar.ops.gpu.run import channel_for, peers_of, triton_kernels, where
from pypar.reference.collectives import is_layout, size_of
from pypar.reference.vocab_cross_entropy import linear_vocab_cross_entropy as linear_reference
from pypar.reference.vocab_cross_entropy import own_columns, wide_type
from pypar.reference.vocab_cross_entropy import vocab_cross_entropy as reference
from pypar.reference.vocab_cross_entropy import vocab_cross_entropy_dlogits as dlogits_reference

FUSED = (torch.float32, torch.bfloat16, torch.float16)
Results = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@dataclasses.dataclass(frozen=True)
class _Problem:
    """What the kernels are told: the first column of this rank, the columns of all, and how a row's loss is taken."""

    begin: int
    vocabulary: int
    ignore_index: int
    label_smoothing: float


def _problem(
    columns: int,
    target: torch.Tensor,
    sizes: list[int] | None,
    ignore_index: int,
    label_smoothing: float,
    group_name: str,
) -> _Problem:
    """Raises ValueError where sizes don't fit or a target lies outside the vocabulary.

    To look at the targets takes a wait for the GPU, which is not allowed while a graph is captured; there, and in its
    replays, such a target makes the loss NaN.
    """
    capturing = target.is_cuda and torch.cuda.is_current_stream_capturing()
    own = own_columns(columns, target[:0] if capturing else target, sizes, ignore_index, group_name)
    vocabulary = sum(sizes) if sizes is not None else columns * size_of(group_name)
    return _Problem(own.start, vocabulary, ignore_index, label_smoothing)


def _peers(logits: torch.Tensor, group_name: str) -> dist.ProcessGroup | None:
    """The group where the kernels serve such logits in it."""
    group = peers_of(logits, group_name)
    return group if triton_kernels("vocab_cross_entropy") is not None and logits.dtype in FUSED else None


def _exchange(logits: torch.Tensor, target: torch.Tensor, problem: _Problem, group: dist.ProcessGroup) -> Results:
    kernels: Any = triton_kernels("vocab_cross_entropy")
    slot = kernels.vocab_cross_entropy_bytes(len(target), group.size(), problem.label_smoothing)
    with channel_for(group, "vocab_cross_entropy", slot, logits.device) as channel:
        results = kernels.vocab_cross_entropy(logits, target, **where(channel), **dataclasses.asdict(problem))
        channel.after()
    return results


def vocab_cross_entropy(
    logits: torch.Tensor,
    target: torch.Tensor,
    sizes: list[int] | None,
    ignore_index: int,
    label_smoothing: float,
    group_name: str,
    determinism: str = "run",
) -> Results:
    group = _peers(logits, group_name)
    if is_layout(determinism) or group is None:
        return reference(logits, target, sizes, ignore_index, label_smoothing, group_name, determinism)
    problem = _problem(logits.shape[1], target, sizes, ignore_index, label_smoothing, group_name)
    return _exchange(logits, target, problem, group)


def vocab_cross_entropy_dlogits(
    logits: torch.Tensor,
    target: torch.Tensor,
    stats: torch.Tensor,
    dloss: torch.Tensor,
    sizes: list[int] | None,
    ignore_index: int,
    label_smoothing: float,
    group_name: str,
) -> torch.Tensor:
    """Exchanges nothing, so that only Triton and the dtype decide."""
    kernels = triton_kernels("vocab_cross_entropy")
    if kernels is None or logits.dtype not in FUSED or stats.dtype != torch.float32:
        return dlogits_reference(logits, target, stats, dloss, sizes, ignore_index, label_smoothing, group_name)
    problem = _problem(logits.shape[1], target, sizes, ignore_index, label_smoothing, group_name)
    return kernels.vocab_cross_entropy_dlogits(logits, target, stats, dloss, **dataclasses.asdict(problem))


def _add_product(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """total += a @ b. A GPU multiplies half types as they are and adds in float32; a CPU, which only emulates it, has
    no such matmul."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    elif a.is_cuda:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total.addmm_(a.to(total.dtype), b.to(total.dtype))


def linear_vocab_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    sizes: list[int] | None,
    ignore_index: int,
    label_smoothing: float,
    chunk_rows: int,
    needs_dhidden: bool,
    needs_dweight: bool,
    group_name: str,
    determinism: str = "run",
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of chunk_rows rows at a time there are logits and their gradient. The matmuls are plain ones, and dhidden is
    summed over the ranks at the end: a vocabulary is so wide that there is little to gain from overlap."""
    if chunk_rows < 1:
        raise ValueError(f"chunk_rows is {chunk_rows}, expected at least 1")
    if is_layout(determinism):
        return linear_reference(
            hidden, weight, target, sizes, ignore_index, label_smoothing, chunk_rows, needs_dhidden, needs_dweight,
            group_name, determinism,
        )  # fmt: skip
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1] or len(target) != len(hidden):
        raise ValueError(
            f"linear_vocab_cross_entropy: hidden [T, K], weight [V_r, K] and target [T] don't fit: "
            f"{list(hidden.shape)}, {list(weight.shape)}, {list(target.shape)}"
        )
    columns, group = len(weight), _peers(hidden, group_name)
    # Once for all rows, so that no chunk waits for the GPU.
    problem = _problem(columns, target, sizes, ignore_index, label_smoothing, group_name)
    shared, wide = (sizes, ignore_index, label_smoothing, group_name), wide_type(hidden.dtype)
    totals = hidden.new_zeros(2, dtype=torch.float64)
    dhidden = hidden.new_empty(len(hidden) if needs_dhidden else 0, hidden.shape[1])
    dweight = hidden.new_zeros(columns if needs_dweight else 0, hidden.shape[1], dtype=wide)
    dloss = hidden.new_ones((), dtype=wide)
    buffer = hidden.new_empty(min(chunk_rows, len(hidden)), columns)
    for first in range(0, max(1, len(hidden)), chunk_rows):
        x, ids = hidden[first : first + chunk_rows], target[first : first + chunk_rows]
        logits = torch.mm(x, weight.t(), out=buffer[: len(x)])
        if group is None:
            loss, count, stats = reference(logits, ids, *shared)
        else:
            loss, count, stats = _exchange(logits, ids, problem, group)
        totals += torch.stack([loss, count])
        if not needs_dhidden and not needs_dweight:
            continue
        if group is None:
            dlogits = vocab_cross_entropy_dlogits(logits, ids, stats, dloss, *shared)
        else:
            kernels: Any = triton_kernels("vocab_cross_entropy")
            dlogits = kernels.vocab_cross_entropy_dlogits(logits, ids, stats, dloss, **dataclasses.asdict(problem))
        if needs_dhidden:
            torch.mm(dlogits, weight, out=dhidden[first : first + chunk_rows])
        if needs_dweight:
            _add_product(dweight, dlogits.t(), x)
    if needs_dhidden:
        dhidden = collectives.all_reduce(dhidden, "sum", group_name)
    loss, count = (total.clone() for total in totals.to(wide))
    return loss, count, dhidden, dweight
