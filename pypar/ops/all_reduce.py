from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from pypar.ops.gpu import collectives as gpu
from pypar.ops.library import define, name_of
from pypar.reference.all_reduce import all_reduce as reference
from pypar.reference.all_reduce import all_reduce_shares as shares_reference


def _reference_(x: torch.Tensor, op: str, group_name: str) -> None:
    x.copy_(reference(x, op, group_name))


define(
    "all_reduce(Tensor x, str op, str group_name) -> Tensor",
    reference,
    lambda x, op, group_name: torch.empty_like(x),
    gpu.all_reduce,
)
define(  # of 8 shares in all, along the tree of determinism "layout"
    "all_reduce_shares(Tensor x, str group_name) -> Tensor",
    shares_reference,
    lambda x, group_name: x.new_empty(x.shape[1:]),
)
define(
    "all_reduce_(Tensor(a!) x, str op, str group_name) -> ()",
    _reference_,
    lambda x, op, group_name: None,
    gpu.all_reduce_,
)


class _AllReduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, op: str, group_name: str) -> torch.Tensor:
        ctx.op, ctx.group_name = op, group_name
        return torch.ops.pypar.all_reduce(x, op, group_name)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        if ctx.op not in ("sum", "avg"):
            raise RuntimeError(f"all_reduce with op '{ctx.op}' has no gradient; only sum and avg do")
        return torch.ops.pypar.all_reduce(grads[0], ctx.op, ctx.group_name), None, None


def all_reduce(x: torch.Tensor, group: dist.ProcessGroup | str | None = None, op: str = "sum") -> torch.Tensor:
    """y = x of rank 0 op x of rank 1 op ..., on every rank.

    Shapes         x any shape, the same on every rank; y as x. In place: torch.ops.pypar.all_reduce_(x, op, group_name)
    Backward       dx = all_reduce(dy, op), for sum and avg
    Communicates   a tensor in symmetric memory: (R-1)/R numel read, as many written; otherwise staged once more
    Saves          nothing
    Concurrency    one call at a time per group, in the same order on every rank
    Numerics       rank order 0..R-1, float32 accumulation of half types, one rounding; the same bits on every rank. On
                   GPUs whose switch was asked to add (pypar.ops.gpu.decide.Limits): in its order
    Raises         ValueError: a reduction without meaning for the dtype; pypar.PeerError: a rank died, called something
                   else, or did not answer within the group's timeout
    Source         in place: every rank reduces its slice and writes it to all (one-copy all-reduce of MPI's shared
                   memory transports); staged: one shot up to 64 KiB or two ranks, else reduce-scatter + all-gather
    """
    return _AllReduce.apply(x, op, name_of(group))
