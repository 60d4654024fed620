from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from pypar.ops.gpu import moves as gpu
from pypar.ops.library import define, name_of
from pypar.reference.broadcast import broadcast as reference
from pypar.reference.collectives import group_of


def _reference_(x: torch.Tensor, root: int, group_name: str) -> None:
    x.copy_(reference(x, root, group_name))


define(
    "broadcast(Tensor x, int root, str group_name) -> Tensor",
    reference,
    lambda x, root, group_name: torch.empty_like(x),
    gpu.broadcast,
)
define(
    "broadcast_(Tensor(a!) x, int root, str group_name) -> ()",
    _reference_,
    lambda x, root, group_name: None,
    gpu.broadcast_,
)


class _Broadcast(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, root: int, group_name: str) -> torch.Tensor:
        ctx.root, ctx.group_name = root, group_name
        return torch.ops.pypar.broadcast(x, root, group_name)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        dx = torch.ops.pypar.all_reduce(grads[0], "sum", ctx.group_name)
        return (dx if group_of(ctx.group_name).rank() == ctx.root else torch.zeros_like(dx)), None, None


def broadcast(x: torch.Tensor, root: int = 0, group: dist.ProcessGroup | str | None = None) -> torch.Tensor:
    """y = x of rank root, on every rank.

    Shapes         x any shape, the same on every rank; y as x
    In place       torch.ops.pypar.broadcast_(x, root, group_name)
    Backward       dx = sum of dy over ranks on root, zero elsewhere
    Communicates   numel, from root to each peer
    Concurrency    one call at a time per group, in the same order on every rank
    Raises         ValueError: root is not a rank of the group; pypar.PeerError: as all_reduce
    """
    return _Broadcast.apply(x, root, name_of(group))
