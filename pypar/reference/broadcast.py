from __future__ import annotations

import torch

from pypar.reference.collectives import from_all_ranks


def broadcast(x: torch.Tensor, root: int, group_name: str) -> torch.Tensor:
    return from_all_ranks(x, group_name)[root].clone()
