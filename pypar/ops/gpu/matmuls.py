"""Fused matmuls of CUDA tensors: triton_kernels where all ranks reach each other's memory and fusing pays.

Elsewhere a plain matmul and the collective beside it, which give the same sums.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pypar.ops.gpu import collectives
from pypar.ops.gpu.decide import fuses
from pypar.ops.gpu.run import channel_for, peers_of, triton_kernels, where
from pypar.reference.all_gather_matmul import all_gather_matmul as all_gather_matmul_reference
from pypar.reference.collectives import group_of, is_layout, rows_per_rank, wide_type
from pypar.reference.matmul_all_reduce import matmul_all_reduce as matmul_all_reduce_reference
from pypar.reference.matmul_all_reduce import product, sum_and_round
from pypar.reference.matmul_reduce_scatter import matmul_reduce_scatter as matmul_reduce_scatter_reference

Tensors = Sequence[torch.Tensor]
FUSED = (torch.float32, torch.bfloat16, torch.float16)


def _one(operands: Tensors) -> torch.Tensor:
    """Of the sum of xs[i] @ weights[i].T the operand of one product."""
    return operands[0] if len(operands) == 1 else torch.cat(list(operands), 1)


def _share(xs: Tensors, weights: Tensors, *additions: torch.Tensor | None) -> torch.Tensor:
    """This rank's part of the sum, rounded to the dtype; kept wide where more is added before the one rounding."""
    share = product(list(xs), list(weights))
    return share.to(wide_type(share.dtype)) if any(a is not None for a in additions) else share


def all_gather_matmul(
    x: torch.Tensor,
    weights: Tensors,
    biases: Sequence[torch.Tensor | None],
    splits: list[int] | None,
    group_name: str,
    determinism: str = "run",
    num_chunks: int = 0,
) -> list[torch.Tensor]:
    if is_layout(determinism):
        return all_gather_matmul_reference(x, list(weights), list(biases), splits, group_name, determinism)
    group, kernels = peers_of(x, group_name), triton_kernels("all_gather_matmul")
    size = group_of(group_name).size()
    rows = list(splits) if splits is not None else [x.shape[0]] * size
    if group is None or kernels is None or x.dtype not in FUSED or not fuses(sum(rows)):
        full = collectives.all_gather(x, group_name, rows)
        given = list(biases) or [None] * len(weights)
        return [torch.nn.functional.linear(full, w, b) for w, b in zip(weights, given, strict=True)]
    slot = kernels.all_gather_matmul_bytes(max(rows), x.shape[1], size, x.dtype)
    with channel_for(group, "all_gather_matmul", slot, x.device) as channel:
        ys = kernels.all_gather_matmul(x, list(weights), **where(channel), biases=list(biases) or None, splits=rows)
        channel.after()
    return ys


def matmul_reduce_scatter(
    xs: Tensors,
    weights: Tensors,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    splits: list[int] | None,
    group_name: str,
    determinism: str = "run",
    sizes: list[int] | None = None,
    num_chunks: int = 0,
) -> torch.Tensor:
    if is_layout(determinism):
        return matmul_reduce_scatter_reference(
            list(xs), list(weights), bias, residual, splits, group_name, determinism, sizes
        )
    group, kernels = peers_of(xs[0], group_name), triton_kernels("matmul_reduce_scatter")
    size, rows = group_of(group_name).size(), xs[0].shape[0]
    if group is None or kernels is None or xs[0].dtype not in FUSED or not fuses(rows):
        counts = rows_per_rank(rows, size, splits)
        share = _share(xs, weights, bias, residual)
        total = collectives.reduce_scatter(share, "sum", group_name, counts)
        return sum_and_round([total], bias, residual).to(xs[0].dtype)
    slot = kernels.matmul_reduce_scatter_bytes(rows, weights[0].shape[0], size, xs[0].dtype, splits)
    with channel_for(group, "matmul_reduce_scatter", slot, xs[0].device) as channel:
        y = kernels.matmul_reduce_scatter(
            _one(xs), _one(weights), **where(channel), bias=bias, residual=residual, splits=splits
        )
        channel.after()
    return y


def matmul_all_reduce(
    xs: Tensors,
    weights: Tensors,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    group_name: str,
    determinism: str = "run",
    sizes: list[int] | None = None,
    num_chunks: int = 0,
) -> torch.Tensor:
    if is_layout(determinism):
        return matmul_all_reduce_reference(list(xs), list(weights), bias, residual, group_name, determinism, sizes)
    group, kernels = peers_of(xs[0], group_name), triton_kernels("matmul_all_reduce")
    size, rows = group_of(group_name).size(), xs[0].shape[0]
    if group is None or kernels is None or xs[0].dtype not in FUSED or not fuses(rows):
        share = _share(xs, weights, bias, residual)
        total = collectives.all_reduce(share, "sum", group_name)
        return sum_and_round([total], bias, residual).to(xs[0].dtype)
    slot = kernels.matmul_all_reduce_bytes(rows, weights[0].shape[0], size, xs[0].dtype)
    with channel_for(group, "matmul_all_reduce", slot, xs[0].device) as channel:
        y = kernels.matmul_all_reduce(_one(xs), _one(weights), **where(channel), bias=bias, residual=residual)
        channel.after()
    return y
