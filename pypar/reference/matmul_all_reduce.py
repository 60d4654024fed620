from __future__ import annotations

import torch

from pypar.reference.collectives import from_all_ranks


def product(xs: list[torch.Tensor], weights: list[torch.Tensor]) -> torch.Tensor:
    """The sum of xs[i] @ weights[i].T on this rank."""
    total = xs[0] @ weights[0].t()
    for x, w in zip(xs[1:], weights[1:], strict=True):
        total = torch.addmm(total, x, w.t())
    return total


def sum_and_round(parts: list[torch.Tensor], bias: torch.Tensor | None, residual: torch.Tensor | None) -> torch.Tensor:
    """The parts in rank order, then bias, then residual; half types in float32, rounded once."""
    dtype = parts[0].dtype
    wide = torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype
    total = parts[0].to(wide)
    for more in [*parts[1:], bias, residual]:
        if more is not None:
            total = total + more.to(wide)
    return total.to(dtype)


def matmul_all_reduce(
    xs: list[torch.Tensor],
    weights: list[torch.Tensor],
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    group_name: str,
    num_chunks: int = 0,
) -> torch.Tensor:
    return sum_and_round(from_all_ranks(product(xs, weights), group_name), bias, residual)
