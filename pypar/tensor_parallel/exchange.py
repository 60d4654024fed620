"""What crosses ranks around a parallel layer, each with its backward.

A tensor is either *full*, the same on every rank, with the same full gradient on every rank; or a *share* that only
this rank has. These functions lead from one to the other, so that parameters used on full tensors get equal gradients.
"""

from __future__ import annotations

from typing import Any

import torch

from pypar.tensor_parallel.cut import Cut


class _CopyIn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group_name: str) -> torch.Tensor:
        ctx.group_name = group_name
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        return torch.ops.pypar.all_reduce(grads[0].contiguous(), "sum", ctx.group_name), None


def copy_in(x: torch.Tensor, group_name: str) -> torch.Tensor:
    """A full x for uses that differ by rank: identity; dx = the sum over ranks of what each found."""
    return _CopyIn.apply(x, group_name) if x.requires_grad and torch.is_grad_enabled() else x


class _ReduceOut(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group_name: str) -> torch.Tensor:
        return torch.ops.pypar.all_reduce(x.contiguous(), "sum", group_name)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grads[0], None


def reduce_out(x: torch.Tensor, group_name: str) -> torch.Tensor:
    """The sum of all ranks' x, full; dx = dy, since every rank has all of it."""
    return _ReduceOut.apply(x, group_name)


def gather(x: torch.Tensor, cut: Cut, dim: int, group_name: str) -> torch.Tensor:
    """The full tensor from every rank's share along `dim`. No gradient."""
    rows = torch.ops.pypar.all_gather(x.movedim(dim, 0).contiguous(), group_name, cut.sizes())
    return cut.put(rows, 0).movedim(0, dim).contiguous()


class _GatherLast(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, cut: Cut, rank: int, group_name: str) -> torch.Tensor:
        ctx.cut, ctx.rank = cut, rank
        return gather(x, cut, -1, group_name)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        return ctx.cut.take(grads[0], ctx.rank, -1), None, None, None


def gather_last(x: torch.Tensor, cut: Cut, rank: int, group_name: str) -> torch.Tensor:
    """Shares of the last dim, joined to a full tensor; dx = this rank's part of dy."""
    return _GatherLast.apply(x, cut, rank, group_name)


class _SplitLast(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, cut: Cut, rank: int, group_name: str) -> torch.Tensor:
        ctx.cut, ctx.group_name = cut, group_name
        return cut.take(x, rank, -1).contiguous()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        return gather(grads[0], ctx.cut, -1, ctx.group_name), None, None, None


def split_last(x: torch.Tensor, cut: Cut, rank: int, group_name: str) -> torch.Tensor:
    """This rank's part of a full x along the last dim; dx = the parts of all ranks, joined."""
    return _SplitLast.apply(x, cut, rank, group_name)


class _SumCopies(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, w: torch.Tensor, cut: Cut, dim: int, rank: int, group_name: str) -> torch.Tensor:
        ctx.cut, ctx.dim, ctx.rank, ctx.group_name = cut, dim, rank, group_name
        return w.view_as(w)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        dw = grads[0].movedim(ctx.dim, 0)
        here, there, count = ctx.cut.copied(ctx.rank)
        at, to = (torch.tensor(i, dtype=torch.int64, device=dw.device) for i in (here, there))
        sums = dw.new_zeros(count, *dw.shape[1:]).index_copy(0, to, dw.index_select(0, at))
        torch.ops.pypar.all_reduce_(sums, "sum", ctx.group_name)
        dw = dw.index_copy(0, at, sums.index_select(0, to))
        return dw.movedim(0, ctx.dim), None, None, None, None


def sum_copies(w: torch.Tensor, cut: Cut, dim: int, rank: int, group_name: str) -> torch.Tensor:
    """A parameter cut by `cut`; the gradient of indices that several ranks hold is summed over all of them."""
    if not cut.has_copies() or not w.requires_grad or not torch.is_grad_enabled():
        return w
    return _SumCopies.apply(w, cut, dim, rank, group_name)
