from __future__ import annotations

import torch

from pypar.reference.collectives import from_all_ranks, group_of, reduce_in_rank_order, rows_per_rank


def reduce_scatter(x: torch.Tensor, op: str, group_name: str, splits: list[int] | None = None) -> torch.Tensor:
    group = group_of(group_name)
    total = reduce_in_rank_order(from_all_ranks(x, group_name), op)
    return total.split(rows_per_rank(x.shape[0], group.size(), splits))[group.rank()].clone()
