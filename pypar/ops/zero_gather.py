from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, overload

import torch
import torch.distributed as dist

from pypar import symmetric
from pypar.ops.gpu import zero as gpu
from pypar.ops.library import define, name_of
from pypar.reference.collectives import group_of
from pypar.reference.zero_gather import zero_gather as reference

define(
    "zero_gather(Tensor(a!) full, Tensor shard, int[] sizes, str group_name) -> ()",
    reference,
    lambda full, shard, sizes, group_name: None,
    gpu.zero_gather,
)


class Gathering:
    """A zero_gather on its way. wait() returns when `full` is there, at once if it was already; raises as zero_gather.
    Until then nobody may write to full or shard, nor give their memory back."""

    def __init__(self, work: Any, finish: Callable[[], None] | None = None):
        self._work, self._finish = work, finish

    def wait(self) -> None:
        work, self._work = self._work, None
        if work is not None:
            work.wait()
        finish, self._finish = self._finish, None
        if finish is not None:
            finish()


@overload
def zero_gather(
    full: torch.Tensor,
    shard: torch.Tensor,
    sizes: list[int],
    group: dist.ProcessGroup | str | None = ...,
    *,
    async_op: Literal[False] = ...,
) -> None: ...
@overload
def zero_gather(
    full: torch.Tensor,
    shard: torch.Tensor,
    sizes: list[int],
    group: dist.ProcessGroup | str | None = ...,
    *,
    async_op: Literal[True],
) -> Gathering: ...
def zero_gather(
    full: torch.Tensor,
    shard: torch.Tensor,
    sizes: list[int],
    group: dist.ProcessGroup | str | None = None,
    *,
    async_op: bool = False,
) -> Gathering | None:
    """full = the shard of rank 0, then that of rank 1, ...; in place.

    Shapes         full [sum(sizes)], shard [sizes[rank]], of one floating type; sizes may differ and be 0. The shard
                   may be its own part of `full`
    async_op       returns a Gathering, whose wait() ends the call; without it the call is over when this returns
    Backward       none: parameters are gathered, their gradients are zero_scatter's
    Communicates   the shard to each of R-1 peers; pushed straight into their `full` where that lies in symmetric memory
    Concurrency    one after the other per group, in the same order on every rank. An asynchronous call over "pypar"
                   runs in the group's thread, or in the one that waits for it; over gloo in gloo's
    Raises         ValueError: sizes or types that don't fit; pypar.PeerError: ranks that disagree, a rank that died
    Source         Rajbhandari et al., ZeRO (2020), stage 3
    """
    name = name_of(group)
    if not async_op and full.device.type in ("cpu", "cuda"):
        torch.ops.pypar.zero_gather(full, shard, sizes, name)
        return None
    gathering = _start(full.detach(), shard.detach(), sizes, group_of(name))
    if async_op:
        return gathering
    gathering.wait()
    return None


def _start(full: torch.Tensor, shard: torch.Tensor, sizes: list[int], group: dist.ProcessGroup) -> Gathering:
    rank, most = group.rank(), max(sizes)
    if len(sizes) != group.size() or full.shape != (sum(sizes),):
        raise ValueError(f"zero_gather: sizes {sizes} don't cut full {list(full.shape)} for {group.size()} ranks")
    if not full.is_contiguous() or not full.is_floating_point():
        raise ValueError(
            f"zero_gather: full is {full.dtype}{'' if full.is_contiguous() else ', not contiguous'}; "
            "expected a contiguous floating type"
        )
    if shard.dtype != full.dtype or shard.shape != (sizes[rank],):
        raise ValueError(
            f"zero_gather: shard is {shard.dtype}{list(shard.shape)}, expected {full.dtype}[{sizes[rank]}] on rank "
            f"{rank}"
        )
    if most == 0:
        return Gathering(None)
    if all(size == most for size in sizes):
        return Gathering(dist.all_gather_single(full, shard.contiguous(), group=group, async_op=True))
    if symmetric.backend_name(group, full.device) == "pypar":
        return Gathering(dist.all_gather(list(full.split(sizes)), shard.contiguous(), group=group, async_op=True))
    # Other backends take equal parts.
    padded = shard.new_zeros(most)
    padded[: sizes[rank]] = shard
    everyone = full.new_empty(len(sizes), most)
    work = dist.all_gather_single(everyone.view(-1), padded, group=group, async_op=True)

    def finish() -> None:
        for part, row in zip(full.split(sizes), everyone, strict=True):
            part.copy_(row[: part.numel()])

    return Gathering(work, finish)
