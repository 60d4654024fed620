from __future__ import annotations

import torch

from pypar.reference.collectives import from_all_ranks, group_of


def zero_scatter(
    shard: torch.Tensor, full: torch.Tensor, sizes: list[int], scale: float, accumulate: bool, group_name: str
) -> torch.Tensor:
    rank = group_of(group_name).rank()
    begin = sum(sizes[:rank])
    total = torch.zeros_like(shard)
    for part in from_all_ranks(full, group_name):  # in rank order
        total = total + part[begin : begin + sizes[rank]].float()
    shard.copy_(total * scale + shard if accumulate else total * scale)
    return shard.double().square().sum()
