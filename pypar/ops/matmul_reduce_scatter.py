from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from pypar.ops.fixed_matmul import fixed_grads
from pypar.ops.gpu import matmuls as gpu
from pypar.ops.library import autocast, define, name_of
from pypar.reference.collectives import group_of, is_layout, rows_per_rank, size_of
from pypar.reference.matmul_reduce_scatter import matmul_reduce_scatter as reference


def _fake(
    xs: Sequence[torch.Tensor],
    weights: Sequence[torch.Tensor],
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    splits: list[int] | None,
    group_name: str,
    determinism: str = "run",
    sizes: list[int] | None = None,
    num_chunks: int = 0,
) -> torch.Tensor:
    group = group_of(group_name)
    return xs[0].new_empty(rows_per_rank(xs[0].shape[0], group.size(), splits)[group.rank()], weights[0].shape[0])


define(
    "matmul_reduce_scatter(Tensor[] xs, Tensor[] weights, Tensor? bias, Tensor? residual, SymInt[]? splits, "
    "str group_name, str determinism='run', SymInt[]? sizes=None, int num_chunks=0) -> Tensor",
    reference,
    _fake,
    gpu.matmul_reduce_scatter,
)


class _MatmulReduceScatter(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        w: torch.Tensor,
        bias: torch.Tensor | None,
        residual: torch.Tensor | None,
        splits: list[int] | None,
        group_name: str,
        determinism: str,
        sizes: list[int] | None,
    ) -> torch.Tensor:
        ctx.layout = is_layout(determinism)
        ctx.save_for_backward(x, w)
        ctx.group_name, ctx.rows = group_name, rows_per_rank(x.shape[0], size_of(group_name), splits)
        return torch.ops.pypar.matmul_reduce_scatter([x], [w], bias, residual, splits, group_name, determinism, sizes)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        x, w = ctx.saved_tensors
        needs_x, needs_w, needs_bias, needs_residual, *_ = ctx.needs_input_grad
        dy, dx, dw = grads[0], None, None
        if ctx.layout:
            full = torch.ops.pypar.all_gather(dy.contiguous(), ctx.group_name, ctx.rows)
            dx, dw, dbias = fixed_grads(full, x, w, ctx.needs_input_grad)
            # All rows are at hand, and must be added in one order; the others' zeros keep "its sum over ranks" true.
            if dbias is not None and group_of(ctx.group_name).rank() != 0:
                dbias = torch.zeros_like(dbias)
            return dx, dw, dbias, dy if needs_residual else None, None, None, None, None
        if needs_x or needs_w:
            dx, dw = torch.ops.pypar.all_gather_matmul_both(dy, x, w, needs_x, needs_w, ctx.rows, ctx.group_name)
        return (
            dx if needs_x else None,
            dw if needs_w else None,
            dy.sum(0) if needs_bias else None,
            dy if needs_residual else None,
            None,
            None,
            None,
            None,
        )


def matmul_reduce_scatter(
    x: torch.Tensor,
    w: torch.Tensor,
    group: dist.ProcessGroup | str | None = None,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    splits: list[int] | None = None,
    determinism: str = "run",
    sizes: list[int] | None = None,
) -> torch.Tensor:
    """y = this rank's rows of (the sum over ranks of x_r @ w_r.T) + bias + residual.

    Shapes         x [M, K/R] sharded over K, w [N, K/R] sharded over K, y [M_r, N]; M_r = splits[r], or ceil(M/R), the
                   last ranks fewer or none; bias [N] the same on all ranks, residual [M_r, N]. sizes: of K by rank, for
                   determinism "layout"; None: as many on every rank
    Backward       dx = dy of all ranks @ w, dw = dy of all ranks.T @ x, with one gather for both; dbias = the sum of
                   this rank's rows of dy (its sum over ranks is the gradient of a bias that all hold); dresidual = dy
    Communicates   (R-1)/R * M * N written by each rank, straight into memory that the owners read, as many read.
                   Between hosts: in chunks where that pays, see pypar.explain
    Saves          x, w
    Concurrency    one call at a time per group, in the same order on every rank
    Numerics       shares rounded to the dtype, summed in float32 in rank order, then bias, residual, one rounding: the
                   same bits in every run. determinism "layout": as matmul_all_reduce, with any splits; dbias is then on
                   rank 0 the sum of all rows, on the others 0. Between hosts the ranks of a host first, then the hosts
    Autocast       casts every operand, as torch's matmuls
    Raises         ValueError: shapes or dtypes that don't fit, ranks whose parts of K aren't whole virtual shards;
                   pypar.PeerError: as all_gather_matmul
    Source         as all_gather_matmul
    """
    x, w, bias, residual = autocast(x, x, w, bias, residual)
    return _MatmulReduceScatter.apply(x, w, bias, residual, splits, name_of(group), determinism, sizes)
