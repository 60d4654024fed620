from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from pypar.ops.fixed_matmul import fixed_grads
from pypar.ops.gpu import matmuls as gpu
from pypar.ops.library import autocast, define, name_of
from pypar.reference.collectives import is_layout
from pypar.reference.matmul_all_reduce import matmul_all_reduce as reference

define(
    "matmul_all_reduce(Tensor[] xs, Tensor[] weights, Tensor? bias, Tensor? residual, str group_name, "
    "str determinism='run', SymInt[]? sizes=None, int num_chunks=0) -> Tensor",
    reference,
    lambda xs, weights, *_: xs[0].new_empty(xs[0].shape[0], weights[0].shape[0]),
    gpu.matmul_all_reduce,
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
        determinism: str,
        sizes: list[int] | None,
    ) -> torch.Tensor:
        ctx.save_for_backward(x, w)
        ctx.layout = is_layout(determinism)
        return torch.ops.pypar.matmul_all_reduce([x], [w], bias, residual, group_name, determinism, sizes)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        x, w = ctx.saved_tensors
        needs_x, needs_w, needs_bias, needs_residual, *_ = ctx.needs_input_grad
        dy = grads[0]
        if ctx.layout:
            return *fixed_grads(dy, x, w, ctx.needs_input_grad), dy if needs_residual else None, None, None, None
        return (
            dy @ w if needs_x else None,
            dy.t() @ x if needs_w else None,
            dy.sum(0) if needs_bias else None,
            dy if needs_residual else None,
            None,
            None,
            None,
        )


def matmul_all_reduce(
    x: torch.Tensor,
    w: torch.Tensor,
    group: dist.ProcessGroup | str | None = None,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    determinism: str = "run",
    sizes: list[int] | None = None,
) -> torch.Tensor:
    """y = the sum over ranks of x_r @ w_r.T, + bias + residual, on every rank.

    Shapes         x [M, K/R] sharded over K, w [N, K/R] sharded over K, y [M, N]; bias [N], residual [M, N], both the
                   same on all ranks. sizes: of K by rank, for determinism "layout"; None: as many on every rank
    Backward       dx = dy @ w, dw = dy.T @ x, dbias = the sum of the rows of dy, dresidual = dy: all local, since dy is
                   the same on every rank
    Communicates   two ranks or up to 64 KiB: M * N written once, (R-1) * M * N read by each rank; above, every rank
                   sums M/R rows, which go to all. Between hosts: in chunks where that pays, see pypar.explain
    Saves          x, w
    Concurrency    one call at a time per group, in the same order on every rank
    Numerics       shares rounded to the dtype, summed in float32 in rank order, then bias, residual, one rounding: the
                   same bits on every rank and in every run. determinism "layout": the same bits for 1, 2, 4 and 8
                   ranks, too, forward and backward. K is cut into 8 virtual shards as torch.tensor_split cuts, each
                   summed as fixed_matmul sums; their float32 sums are added along the tree ((0+1)+(2+3))+((4+5)+(6+7));
                   then bias, residual, one rounding. Float32 sums travel, so half types cost twice the bytes. Between
                   hosts the ranks of a host first, then the hosts
    Autocast       casts every operand, as torch's matmuls
    Raises         ValueError: shapes or dtypes that don't fit, ranks whose parts of K aren't whole virtual shards;
                   pypar.PeerError: as all_gather_matmul
    Source         Shoeybi et al., Megatron-LM (2019), the row-parallel layer
    """
    x, w, bias, residual = autocast(x, x, w, bias, residual)
    return _MatmulAllReduce.apply(x, w, bias, residual, name_of(group), determinism, sizes)
