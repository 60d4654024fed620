from __future__ import annotations

import torch

from pypar.reference.collectives import from_all_ranks, group_of, is_layout, tree_sum
from pypar.reference.fixed_matmul import branch


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
    determinism: str = "run",
    sizes: list[int] | None = None,
    num_chunks: int = 0,
) -> torch.Tensor:
    if is_layout(determinism):
        group = group_of(group_name)
        total = tree_sum(from_all_ranks(branch(xs, weights, sizes, group.rank(), group.size()), group_name))
        return sum_and_round([total], bias, residual).to(xs[0].dtype)
    return sum_and_round(from_all_ranks(product(xs, weights), group_name), bias, residual)
