from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from pypar.ops.gpu import collectives as gpu
from pypar.ops.library import define, name_of
from pypar.reference.collectives import group_of, rows_per_rank
from pypar.reference.reduce_scatter import reduce_scatter as reference


def _fake(x: torch.Tensor, op: str, group_name: str, splits: list[int] | None = None) -> torch.Tensor:
    rows = rows_per_rank(x.shape[0], group_of(group_name).size(), splits)[group_of(group_name).rank()]
    return x.new_empty((rows, *x.shape[1:]))


def _reference_out(
    out: torch.Tensor, x: torch.Tensor, op: str, group_name: str, splits: list[int] | None = None
) -> None:
    out.copy_(reference(x, op, group_name, splits))


define(
    "reduce_scatter(Tensor x, str op, str group_name, SymInt[]? splits=None) -> Tensor",
    reference,
    _fake,
    gpu.reduce_scatter,
)
define(
    "reduce_scatter_out(Tensor(a!) out, Tensor x, str op, str group_name, SymInt[]? splits=None) -> ()",
    _reference_out,
    lambda out, x, op, group_name, splits=None: None,
)


class _ReduceScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, op: str, group_name: str, splits: list[int] | None) -> torch.Tensor:
        ctx.op, ctx.group_name = op, group_name
        ctx.splits = rows_per_rank(x.shape[0], group_of(group_name).size(), splits)
        return torch.ops.pypar.reduce_scatter(x, op, group_name, splits)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        if ctx.op not in ("sum", "avg"):
            raise RuntimeError(f"reduce_scatter with op '{ctx.op}' has no gradient; only sum and avg do")
        dx = torch.ops.pypar.all_gather(grads[0], ctx.group_name, ctx.splits)
        return (dx / len(ctx.splits) if ctx.op == "avg" else dx), None, None, None


def reduce_scatter(
    x: torch.Tensor, group: dist.ProcessGroup | str | None = None, op: str = "sum", splits: list[int] | None = None
) -> torch.Tensor:
    """y = rows of (x of rank 0 op x of rank 1 op ...) that belong to this rank.

    Shapes         x [M, ...] the same on every rank, y [M_r, ...]; M_r = splits[r], or ceil(M/R), the last ranks fewer
                   or none. Into a given tensor: torch.ops.pypar.reduce_scatter_out(out, x, op, group_name, splits)
    Backward       dx = all_gather(dy), divided by R for avg
    Communicates   (R-1)/R numel read by each rank, in place when x lies in symmetric memory
    Saves          nothing
    Concurrency    one call at a time per group, in the same order on every rank
    Numerics       rank order 0..R-1, float32 accumulation of half types, one rounding
    Raises         ValueError: splits that don't fit; pypar.PeerError: as all_reduce
    """
    return _ReduceScatter.apply(x, op, name_of(group), splits)
