from __future__ import annotations

import torch

from pypar.reference.collectives import from_all_ranks


def all_gather(x: torch.Tensor, group_name: str, splits: list[int] | None = None) -> torch.Tensor:
    parts = from_all_ranks(x, group_name)
    wanted = splits if splits is not None else [x.shape[0]] * len(parts)
    if [p.shape[0] for p in parts] != list(wanted):
        raise ValueError(f"all_gather: expected rows {wanted} by rank, got {[p.shape[0] for p in parts]}")
    return torch.cat(parts)
