from __future__ import annotations

import torch

from pypar.reference.collectives import VIRTUAL_SHARDS, from_all_ranks, reduce_in_rank_order, tree_sum, wide_type


def all_reduce(x: torch.Tensor, op: str, group_name: str) -> torch.Tensor:
    return reduce_in_rank_order(from_all_ranks(x, group_name), op)


def all_reduce_shares(x: torch.Tensor, group_name: str) -> torch.Tensor:
    mine = tree_sum(list(x.to(wide_type(x.dtype)).unbind()))
    parts = from_all_ranks(mine[None], group_name)
    if len(parts) * x.shape[0] != VIRTUAL_SHARDS:
        raise ValueError(f"x has {x.shape[0]} shares on each of {len(parts)} ranks, expected 8 in all")
    return tree_sum([p[0] for p in parts]).to(x.dtype)
