from __future__ import annotations

import torch

from pypar.reference.collectives import from_all_ranks, group_of


def all_to_all(
    x: torch.Tensor, out_splits: list[int] | None, in_splits: list[int] | None, group_name: str
) -> torch.Tensor:
    group = group_of(group_name)
    own = in_splits if in_splits is not None else [x.shape[0] // group.size()] * group.size()
    tables = from_all_ranks(torch.tensor(own, device=x.device), group_name)
    parts = from_all_ranks(x, group_name)
    return torch.cat([p.split(t.tolist())[group.rank()] for p, t in zip(parts, tables, strict=True)])
