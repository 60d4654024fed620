from __future__ import annotations

import torch

from pypar.reference.collectives import from_all_ranks, is_layout
from pypar.reference.fixed_matmul import fixed_matmul


def all_gather_matmul(
    x: torch.Tensor,
    weights: list[torch.Tensor],
    biases: list[torch.Tensor | None],
    splits: list[int] | None,
    group_name: str,
    determinism: str = "run",
    num_chunks: int = 0,
) -> list[torch.Tensor]:
    linear = fixed_matmul if is_layout(determinism) else torch.nn.functional.linear
    parts = from_all_ranks(x, group_name)
    wanted = splits if splits is not None else [x.shape[0]] * len(parts)
    if [p.shape[0] for p in parts] != list(wanted):
        raise ValueError(f"all_gather_matmul: expected rows {wanted} by rank, got {[p.shape[0] for p in parts]}")
    full = torch.cat(parts)
    return [linear(full, w, b) for w, b in zip(weights, biases or [None] * len(weights), strict=True)]
