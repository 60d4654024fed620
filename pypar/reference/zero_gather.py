from __future__ import annotations

import torch

from pypar.reference.collectives import from_all_ranks


def zero_gather(full: torch.Tensor, shard: torch.Tensor, sizes: list[int], group_name: str) -> None:
    parts = from_all_ranks(shard, group_name)  # in rank order
    if [p.numel() for p in parts] != list(sizes) or full.numel() != sum(sizes):
        raise ValueError(
            f"zero_gather: the shards have {[p.numel() for p in parts]} numbers by rank, full has {full.numel()}; "
            f"expected {list(sizes)} and {sum(sizes)}"
        )
    full.copy_(torch.cat(parts))
