from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from pypar.ops.library import autocast, define, name_of
from pypar.reference.matmul_all_reduce import matmul_all_reduce as reference

define(
    "matmul_all_reduce(Tensor[] xs, Tensor[] weights, Tensor? bias, Tensor? residual, str group_name, "
    "int num_chunks=0) -> Tensor",
    reference,
    lambda xs, weights, bias, residual, group_name, num_chunks=0: xs[0].new_empty(xs[0].shape[0], weights[0].shape[0]),
)


class _MatmulAllReduce(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        w: torch.Tensor,
        bias: torch.Tensor | None,
        residual: torch.Tensor | None,
        group_name: str,
    ) -> torch.Tensor:
        ctx.save_for_backward(x, w)
        return torch.ops.pypar.matmul_all_reduce([x], [w], bias, residual, group_name)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        x, w = ctx.saved_tensors
        needs_x, needs_w, needs_bias, needs_residual, _ = ctx.needs_input_grad
        dy = grads[0]
        return (
            dy @ w if needs_x else None,
            dy.t() @ x if needs_w else None,
            dy.sum(0) if needs_bias else None,
            dy if needs_residual else None,
            None,
        )


def matmul_all_reduce(
    x: torch.Tensor,
    w: torch.Tensor,
    group: dist.ProcessGroup | str | None = None,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """y = the sum over ranks of x_r @ w_r.T, + bias + residual, on every rank.

    Shapes         x [M, K/R] sharded over K, w [N, K/R] sharded over K, y [M, N]; bias [N], residual [M, N], both the
                   same on all ranks
    Backward       dx = dy @ w, dw = dy.T @ x, dbias = the sum of the rows of dy, dresidual = dy: all local, since dy is
                   the same on every rank
    Communicates   two ranks or up to 64 KiB: M * N written once, (R-1) * M * N read by each rank; above, every rank
                   sums M/R rows, which go to all. Between hosts: in chunks where that pays, see pypar.explain
    Saves          x, w
    Concurrency    one call at a time per group, in the same order on every rank
    Numerics       shares rounded to the dtype, summed in float32 in rank order, then bias, residual, one rounding: the
                   same bits on every rank and in every run. Between hosts the ranks of a host first, then the hosts
    Autocast       casts every operand, as torch's matmuls
    Raises         ValueError: shapes or dtypes that don't fit; pypar.PeerError: as all_gather_matmul
    Source         Shoeybi et al., Megatron-LM (2019), the row-parallel layer
    """
    x, w, bias, residual = autocast(x, x, w, bias, residual)
    return _MatmulAllReduce.apply(x, w, bias, residual, name_of(group))
