from __future__ import annotations

import torch
import torch.distributed as dist

from pypar.ops.gpu import zero as gpu
from pypar.ops.library import define, name_of
from pypar.reference.zero_scatter import zero_scatter as reference

define(
    "zero_scatter(Tensor(a!) shard, Tensor full, int[] sizes, float scale, bool accumulate, str group_name) -> Tensor",
    reference,
    lambda shard, *_: shard.new_empty((), dtype=torch.float64),
    gpu.zero_scatter,
)


def zero_scatter(
    shard: torch.Tensor,
    full: torch.Tensor,
    sizes: list[int],
    group: dist.ProcessGroup | str | None = None,
    *,
    scale: float = 1.0,
    accumulate: bool = False,
) -> torch.Tensor:
    """shard = scale * the sum over ranks of their `full`, this rank's part of it; returns the sum of its squares.

    Shapes         full [sum(sizes)] float32, bfloat16 or float16, of this rank; shard [sizes[rank]] float32; squares []
                   float64, of this rank's shard
    accumulate     adds to what the shard holds
    Communicates   each rank reads its part of everybody's `full`, in place where that lies in symmetric memory
    Concurrency    one call at a time per group, in the same order on every rank; `full` may be rewritten afterwards
    Numerics       float32 sums in rank order, scaled once, never rounded to a half type; the squares in float32 over
                   blocks of 2048, then float64: the same bits in every run
    Raises         ValueError: sizes or types that don't fit; pypar.PeerError: ranks that disagree, a rank that died
    Source         Rajbhandari et al., ZeRO (2020), stage 2
    """
    return torch.ops.pypar.zero_scatter(shard, full, sizes, scale, accumulate, name_of(group))
