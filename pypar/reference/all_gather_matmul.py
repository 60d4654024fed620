from __future__ import annotations

import torch

from pypar.reference.collectives import from_all_ranks


def all_gather_matmul(
    x: torch.Tensor,
    weights: list[torch.Tensor],
    biases: list[torch.Tensor | None],
    splits: list[int] | None,
    group_name: str,
    num_chunks: int = 0,
) -> list[torch.Tensor]:
    parts = from_all_ranks(x, group_name)
    wanted = splits if splits is not None else [x.shape[0]] * len(parts)
    if [p.shape[0] for p in parts] != list(wanted):
        raise ValueError(f"all_gather_matmul: expected rows {wanted} by rank, got {[p.shape[0] for p in parts]}")
    full = torch.cat(parts)
    return [
        torch.nn.functional.linear(full, w, b) for w, b in zip(weights, biases or [None] * len(weights), strict=True)
    ]
