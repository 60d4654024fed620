from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from pypar.ops.fixed_matmul import fixed_row_sum
from pypar.ops.gpu import matmuls as gpu
from pypar.ops.library import autocast, define, name_of
from pypar.reference.all_gather_matmul import all_gather_matmul as reference
from pypar.reference.collectives import from_all_ranks, is_layout, size_of, virtual_shards

Tensors = Sequence[torch.Tensor]


def _total(x: torch.Tensor, splits: list[int] | None, group_name: str) -> int:
    return sum(splits) if splits is not None else x.shape[0] * size_of(group_name)


def _fake(
    x: torch.Tensor,
    weights: Tensors,
    biases: Sequence[torch.Tensor | None],
    splits: list[int] | None,
    group_name: str,
    determinism: str = "run",
    num_chunks: int = 0,
) -> list[torch.Tensor]:
    return [x.new_empty(_total(x, splits, group_name), w.shape[0]) for w in weights]


def _reference_dw(
    x: torch.Tensor, dys: Tensors, splits: list[int] | None, group_name: str, num_chunks: int = 0
) -> list[torch.Tensor]:
    full = torch.cat(from_all_ranks(x, group_name))
    return [dy.t() @ full for dy in dys]


def _reference_both(
    dy: torch.Tensor,
    x: torch.Tensor,
    w: torch.Tensor,
    needs_dx: bool,
    needs_dw: bool,
    splits: list[int] | None,
    group_name: str,
    num_chunks: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    full = torch.cat(from_all_ranks(dy, group_name))
    return full @ w if needs_dx else x.new_empty(0), full.t() @ x if needs_dw else w.new_empty(0)


define(
    "all_gather_matmul(Tensor x, Tensor[] weights, Tensor?[] biases, SymInt[]? splits, str group_name, "
    "str determinism='run', int num_chunks=0) -> Tensor[]",
    reference,
    _fake,
    gpu.all_gather_matmul,
)
define(
    "all_gather_matmul_dw(Tensor x, Tensor[] dys, SymInt[]? splits, str group_name, int num_chunks=0) -> Tensor[]",
    _reference_dw,
    lambda x, dys, splits, group_name, num_chunks=0: [x.new_empty(dy.shape[1], x.shape[1]) for dy in dys],
)
define(
    "all_gather_matmul_both(Tensor dy, Tensor x, Tensor w, bool needs_dx, bool needs_dw, SymInt[]? splits, "
    "str group_name, int num_chunks=0) -> (Tensor, Tensor)",
    _reference_both,
    lambda dy, x, w, needs_dx, needs_dw, splits, group_name, num_chunks=0: (
        torch.empty_like(x) if needs_dx else x.new_empty(0),
        torch.empty_like(w) if needs_dw else w.new_empty(0),
    ),
)


class _AllGatherMatmul(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        group_name: str,
        splits: list[int] | None,
        determinism: str,
        sizes: list[int] | None,
        num_weights: int,
        *weights_and_biases: torch.Tensor | None,
    ) -> tuple[torch.Tensor, ...]:
        weights, biases = weights_and_biases[:num_weights], weights_and_biases[num_weights:]
        ctx.save_for_backward(x, *weights)
        ctx.group_name, ctx.splits, ctx.determinism, ctx.sizes = group_name, splits, determinism, sizes
        given = biases if any(b is not None for b in biases) else []
        return tuple(torch.ops.pypar.all_gather_matmul(x, weights, given, splits, group_name, determinism))

    @staticmethod
    def backward(ctx: Any, *dys: torch.Tensor) -> tuple[Any, ...]:
        x, *weights = ctx.saved_tensors
        needs_x, _, _, _, _, _, *needs = ctx.needs_input_grad
        num, layout = len(weights), is_layout(ctx.determinism)
        rows = ctx.splits if ctx.splits is not None else [x.shape[0]] * size_of(ctx.group_name)
        dweights: list[torch.Tensor | None] = [None] * num
        wanted = [i for i in range(num) if needs[i]]
        if wanted and layout:  # over all rows in one order, which takes them all at once
            columns = torch.ops.pypar.all_gather(x.contiguous(), ctx.group_name, rows).t()
            for i in wanted:
                dweights[i] = torch.ops.pypar.fixed_matmul(dys[i].t(), columns)
        elif wanted:
            dws = torch.ops.pypar.all_gather_matmul_dw(x, [dys[i] for i in wanted], ctx.splits, ctx.group_name)
            for i, dw in zip(wanted, dws, strict=True):
                dweights[i] = dw
        dx = None
        if needs_x:
            dx = torch.ops.pypar.matmul_reduce_scatter(
                dys, [w.t() for w in weights], None, None, rows, ctx.group_name, ctx.determinism, ctx.sizes
            )
        row_sum = fixed_row_sum if layout else lambda dy: dy.sum(0)
        dbiases = [row_sum(dy) if need else None for dy, need in zip(dys, needs[num:], strict=True)]
        return dx, None, None, None, None, None, *dweights, *dbiases


def all_gather_matmul(
    x: torch.Tensor,
    weights: Sequence[torch.Tensor],
    group: dist.ProcessGroup | str | None = None,
    biases: Sequence[torch.Tensor | None] | None = None,
    splits: list[int] | None = None,
    determinism: str = "run",
    sizes: Sequence[list[int]] | None = None,
) -> list[torch.Tensor]:
    """y_i = (x of all ranks, one below the other) @ w_i.T + b_i.

    Shapes         x [M_r, K] sharded over M, w_i [N_i/R, K] sharded over N, b_i [N_i/R]; y_i [M, N_i/R]. M = the sum of
                   splits, or R * M_r where splits is None. Several weights share one gather. sizes[i]: of N_i by rank,
                   for the backward with determinism "layout"; None: as many on every rank
    Backward       dx = matmul_reduce_scatter(dy_i, w_i.T), summed over i before it travels; dw_i = dy_i.T @ x of all
                   ranks, which are gathered again; db_i = the sum of the rows of dy_i
    Communicates   (R-1) * M_r * K read by each rank, in place if x lies in symmetric memory, else staged once. Between
                   hosts: in chunks where that pays, see pypar.explain
    Saves          x (the shard alone), w_i
    Concurrency    one call at a time per group, in the same order on every rank
    Numerics       a plain matmul per block of rows; dw adds the blocks, own rank first, in float32. determinism
                   "layout": the same bits for 1, 2, 4 and 8 ranks and any splits, forward and backward: y as
                   fixed_matmul, dw and dbias as fixed_matmul over all rows, gathered for it; dx as
                   matmul_reduce_scatter
    Autocast       casts every operand, as torch's matmuls
    Raises         ValueError: shapes or dtypes that don't fit, ranks whose parts of N_i aren't whole virtual shards;
                   pypar.PeerError: ranks that disagree on M or K, a rank that died or did not answer within the group's
                   timeout
    Source         Wang et al., Overlap Communication with Dependent Computation (2023); the in-place read is possible
                   because the ranks of one host share memory
    """
    bias_list = list(biases) if biases is not None else [None] * len(weights)
    if is_layout(determinism) and x.requires_grad and torch.is_grad_enabled():
        world_size = size_of(name_of(group))  # said here, since backward would be late to say it
        for i, w in enumerate(weights):
            virtual_shards(sizes[i] if sizes is not None else [w.shape[0]] * world_size, 0, f"N of weight {i}")
    x, *operands = autocast(x, x, *weights, *bias_list)
    flat = [n for of_ranks in sizes for n in of_ranks] if sizes is not None else None
    ys = _AllGatherMatmul.apply(x, name_of(group), splits, determinism, flat, len(weights), *operands)
    return list(ys)
