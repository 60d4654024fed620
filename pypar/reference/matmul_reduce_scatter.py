from __future__ import annotations

import torch

from pypar.reference.collectives import from_all_ranks, group_of, is_layout, rows_per_rank, tree_sum
from pypar.reference.fixed_matmul import branch
from pypar.reference.matmul_all_reduce import product, sum_and_round


def matmul_reduce_scatter(
    xs: list[torch.Tensor],
    weights: list[torch.Tensor],
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    splits: list[int] | None,
    group_name: str,
    determinism: str = "run",
    sizes: list[int] | None = None,
    num_chunks: int = 0,
) -> torch.Tensor:
    group = group_of(group_name)
    counts = rows_per_rank(xs[0].shape[0], group.size(), splits)
    if is_layout(determinism):
        total = tree_sum(from_all_ranks(branch(xs, weights, sizes, group.rank(), group.size()), group_name))
        return sum_and_round([total.split(counts)[group.rank()]], bias, residual).to(xs[0].dtype)
    mine = [part.split(counts)[group.rank()] for part in from_all_ranks(product(xs, weights), group_name)]
    return sum_and_round(mine, bias, residual)
