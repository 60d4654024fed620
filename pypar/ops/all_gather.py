from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from pypar.ops.gpu import collectives as gpu
from pypar.ops.library import define, name_of
from pypar.reference.all_gather import all_gather as reference
from pypar.reference.collectives import group_of


def _fake(x: torch.Tensor, group_name: str, splits: list[int] | None = None) -> torch.Tensor:
    rows = sum(splits) if splits is not None else x.shape[0] * group_of(group_name).size()
    return x.new_empty((rows, *x.shape[1:]))


def _reference_out(out: torch.Tensor, x: torch.Tensor, group_name: str, splits: list[int] | None = None) -> None:
    out.copy_(reference(x, group_name, splits))


define("all_gather(Tensor x, str group_name, SymInt[]? splits=None) -> Tensor", reference, _fake, gpu.all_gather)
define(
    "all_gather_out(Tensor(a!) out, Tensor x, str group_name, SymInt[]? splits=None) -> ()",
    _reference_out,
    lambda out, x, group_name, splits=None: None,
)


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group_name: str, splits: list[int] | None) -> torch.Tensor:
        ctx.group_name = group_name
        ctx.splits = list(splits) if splits is not None else [x.shape[0]] * group_of(group_name).size()
        return torch.ops.pypar.all_gather(x, group_name, splits)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return torch.ops.pypar.reduce_scatter(grads[0], "sum", ctx.group_name, ctx.splits), None, None


def all_gather(
    x: torch.Tensor, group: dist.ProcessGroup | str | None = None, splits: list[int] | None = None
) -> torch.Tensor:
    """y = rows of rank 0, then rows of rank 1, ...

    Shapes         x [M_r, ...], y [sum M_r, ...]; M_r = splits[r], the same on every rank when splits is None
                   Into a given tensor: torch.ops.pypar.all_gather_out(out, x, group_name, splits)
    Backward       dx = reduce_scatter(dy, sum)
    Communicates   numel of x to each of R-1 peers; pushed straight into their y when y lies in symmetric memory
    Saves          nothing
    Concurrency    one call at a time per group, in the same order on every rank
    Raises         ValueError: splits that don't fit; pypar.PeerError: as all_reduce
    """
    return _AllGather.apply(x, name_of(group), splits)
