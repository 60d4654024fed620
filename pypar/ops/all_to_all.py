from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from pypar.ops.gpu import moves as gpu
from pypar.ops.library import define, name_of
from pypar.reference.all_to_all import all_to_all as reference


def _fake(x: torch.Tensor, out_splits: list[int] | None, in_splits: list[int] | None, group_name: str) -> torch.Tensor:
    return x.new_empty((sum(out_splits) if out_splits is not None else x.shape[0], *x.shape[1:]))


def _reference_out(
    out: torch.Tensor, x: torch.Tensor, out_splits: list[int] | None, in_splits: list[int] | None, group_name: str
) -> None:
    out.copy_(reference(x, out_splits, in_splits, group_name))


define(
    "all_to_all(Tensor x, SymInt[]? out_splits, SymInt[]? in_splits, str group_name) -> Tensor",
    reference,
    _fake,
    gpu.all_to_all,
)
define(
    "all_to_all_out(Tensor(a!) out, Tensor x, SymInt[]? out_splits, SymInt[]? in_splits, str group_name) -> ()",
    _reference_out,
    lambda out, x, out_splits, in_splits, group_name: None,
    gpu.all_to_all_out,
)


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, out_splits: list[int] | None, in_splits: list[int] | None, group_name: str
    ) -> torch.Tensor:
        ctx.out_splits, ctx.in_splits, ctx.group_name = out_splits, in_splits, group_name
        return torch.ops.pypar.all_to_all(x, out_splits, in_splits, group_name)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        dx = torch.ops.pypar.all_to_all(grads[0], ctx.in_splits, ctx.out_splits, ctx.group_name)
        return dx, None, None, None


def all_to_all(
    x: torch.Tensor,
    group: dist.ProcessGroup | str | None = None,
    out_splits: list[int] | None = None,
    in_splits: list[int] | None = None,
) -> torch.Tensor:
    """y = block r of rank 0, then block r of rank 1, ..., for rank r.

    Shapes         x [sum in_splits, ...], y [sum out_splits, ...]; in_splits[d] rows go to rank d, out_splits[s] rows
                   come from rank s; even shares when None (dim 0 must then divide by R)
    Backward       all_to_all with the splits exchanged
    Communicates   every block but the own one
    Saves          nothing
    Concurrency    one call at a time per group, in the same order on every rank
    Raises         ValueError: splits that don't fit x; pypar.PeerError: the splits of two ranks disagree, or as
                   all_reduce
    """
    return _AllToAll.apply(x, out_splits, in_splits, name_of(group))
