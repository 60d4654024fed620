"""Determinism "layout" in the layers: sums over ranks that have the same bits for 1, 2, 4 and 8 of them.

A rank keeps the gradient of a full tensor that column-parallel layers read as one share per virtual shard that it
holds, until all these layers have added theirs: only then are shares summed, along a tree that goes on over the ranks.
So the sum has the same order wherever the ranks' borders are. docs/design/0005-layout-determinism.md
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from pypar.ops.fixed_matmul import fixed_row_sum
from pypar.ops.library import VIRTUAL_SHARDS, virtual_shards
from pypar.tensor_parallel.cut import Cut


def block_sizes(cut: Cut, what: str) -> list[list[int]]:
    """Of the blocks that a cut takes apart, one behind the other (one, or query | key | value), the sizes by rank."""
    if cut.has_copies():
        raise ValueError(
            f"{what}: several ranks hold copies of a part of it (fewer key and value heads than ranks?), each with a "
            "share of its gradient, which determinism 'layout' can't add in one order; use fewer ranks, or "
            "determinism 'run'"
        )
    blocks = list(zip(*cut.ranges, strict=True)) if len({len(r) for r in cut.ranges}) == 1 else []
    if not blocks or any(a[1] != b[0] for block in blocks for a, b in itertools.pairwise(block)):
        raise ValueError(
            f"{what}: determinism 'layout' needs ranks that hold blocks cut one behind the other, got {cut}"
        )
    return [[stop - start for start, stop in block] for block in blocks]


def shard_sizes(cut: Cut, rank: int, what: str) -> list[list[int]]:
    """Of each block, the sizes of this rank's virtual shards. ValueError where the ranks' borders cut one."""
    return [virtual_shards(sizes, rank, what) for sizes in block_sizes(cut, what)]


class _CopyInShares(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, num: int, group_name: str) -> torch.Tensor:
        ctx.group_name = group_name
        return x.expand(num, *x.shape)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return torch.ops.pypar.all_reduce_shares(grads[0].contiguous(), ctx.group_name), None, None


def copy_in_shares(x: torch.Tensor, world_size: int, group_name: str) -> torch.Tensor:
    """copy_in for column_linear: a full x, seen once for each of this rank's virtual shards; no copy is made."""
    if not x.requires_grad or not torch.is_grad_enabled():
        return x[None]
    return _CopyInShares.apply(x, VIRTUAL_SHARDS // world_size, group_name)


class _ColumnLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_shares: torch.Tensor,
        w: torch.Tensor,
        bias: torch.Tensor | None,
        sizes: list[list[int]],
        dtype: torch.dtype | None,
    ) -> torch.Tensor:
        x = x_shares[0] if dtype is None else x_shares[0].to(dtype)
        rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
        ctx.save_for_backward(rows, w)
        ctx.sizes, ctx.like = sizes, (x_shares.shape, x_shares.dtype)
        return torch.ops.pypar.fixed_matmul(rows, w, bias).view(*x.shape[:-1], w.shape[0])

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        x, w = ctx.saved_tensors
        needs_x, needs_w, needs_bias, *_ = ctx.needs_input_grad
        dy = grads[0].reshape(-1, w.shape[0]) if w.shape[0] else grads[0].new_empty(len(x), 0)
        dx = None
        if needs_x:
            blocks = [sum(of_block) for of_block in ctx.sizes]
            flat = [n for of_block in ctx.sizes for n in of_block]
            dys, weights = list(dy.split(blocks, 1)), [part.t() for part in w.split(blocks)]
            shape, dtype = ctx.like
            dx = torch.ops.pypar.fixed_matmul_shares(dys, weights, flat).view(shape).to(dtype)
        dw = torch.ops.pypar.fixed_matmul(dy.t(), x.t()) if needs_w else None
        return dx, dw, fixed_row_sum(dy) if needs_bias else None, None, None


def column_linear(
    x_shares: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None, sizes: list[list[int]]
) -> torch.Tensor:
    """F.linear(x, w, bias) of x_shares = copy_in_shares(x, ...); sizes: of shard_sizes, blocks of rows of w."""
    dtype = None
    if torch.is_autocast_enabled(w.device.type):
        dtype = torch.get_autocast_dtype(w.device.type)
        w, bias = w.to(dtype), bias.to(dtype) if bias is not None else None
    return _ColumnLinear.apply(x_shares, w, bias, sizes, dtype)


def check_targets(targets: Iterable[Any], rank: int) -> None:
    """Refuses, before anything is changed, what can't have the same bits for any number of ranks."""
    for target in targets:
        if target.style.kind not in ("column", "column_qkv", "row", "vocab") or target.dim is not None:
            raise ValueError(
                f"{target.name}: the gradient of a style '{target.style.kind}' adds up what ranks find on their own "
                "part of the activations, which determinism 'layout' can't do in one order; leave it out of the plan, "
                "or use determinism 'run'"
            )
        sizes = shard_sizes(target.cut, rank, target.name)
        if target.style.kind == "row" and len(sizes) > 1:
            raise ValueError(
                f"{target.name}: determinism 'layout' has no row-parallel layer of {len(sizes)} packed blocks; use "
                "determinism 'run'"
            )


class _DenseMatmuls(TorchFunctionMode):
    """torch.matmul of batches, with both factors made contiguous first.

    It does that itself, or not, as strides and the number of heads allow, and passes what it didn't copy to the BLAS as
    a transposed factor, whose product has other bits: in eager attention of one (key and value) head per rank.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        batches = len(args) == 2 and all(isinstance(a, torch.Tensor) and a.dim() > 2 for a in args)
        if batches and func in (torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__):
            args = tuple(a.contiguous() for a in args)
        return func(*args, **(kwargs or {}))


class _InForward:
    def __init__(self) -> None:
        self.entered: list[_DenseMatmuls] = []

    def enter(self, *_: Any) -> None:
        self.entered.append(_DenseMatmuls())
        self.entered[-1].__enter__()

    def leave(self, *_: Any) -> None:
        if self.entered:  # else a hook before this one has failed
            self.entered.pop().__exit__(None, None, None)


def use_dense_matmuls(attention: nn.Module) -> None:
    """Eager attention's products have the same bits whatever the number of heads that a rank has of them."""
    hooks = _InForward()
    attention.register_forward_pre_hook(hooks.enter)
    attention.register_forward_hook(hooks.leave, always_call=True)
