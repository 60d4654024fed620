from __future__ import annotations

import torch

from pypar.reference.collectives import from_all_ranks, reduce_in_rank_order


def all_reduce(x: torch.Tensor, op: str, group_name: str) -> torch.Tensor:
    return reduce_in_rank_order(from_all_ranks(x, group_name), op)
