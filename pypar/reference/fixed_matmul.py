from __future__ import annotations

import torch

from pypar.reference.collectives import tree_sum, virtual_shards, wide_type

BLOCK = 256


def add_range(total: torch.Tensor | None, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor | None:
    """total + x @ w.T in blocks of 256 k. Product and sum are rounded each: no fused multiply-add, no other order."""
    for begin in range(0, x.shape[1], BLOCK):
        block = x.new_zeros(x.shape[0], w.shape[0])
        for k in range(begin, min(begin + BLOCK, x.shape[1])):
            block = block + x[:, k, None] * w[:, k]
        total = block if total is None else total + block
    return total


def part_sums(xs: list[torch.Tensor], weights: list[torch.Tensor], sizes: list[int]) -> list[torch.Tensor]:
    """For each part of K the sum over i of xs[i] @ weights[i].T, in the wide type. sizes: of the parts, for each i."""
    wide, num = wide_type(xs[0].dtype), len(sizes) // len(xs)
    totals: list[torch.Tensor | None] = [None] * num
    for i, (x, w) in enumerate(zip(xs, weights, strict=True)):
        of_parts = sizes[i * num : (i + 1) * num]
        pairs = zip(x.to(wide).split(of_parts, 1), w.to(wide).split(of_parts, 1), strict=True)
        totals = [add_range(total, *pair) for total, pair in zip(totals, pairs, strict=True)]
    return [t if t is not None else xs[0].new_zeros(len(xs[0]), len(weights[0]), dtype=wide) for t in totals]


def fixed_matmul(x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    (y,) = part_sums([x], [w], [x.shape[1]])
    return (y if bias is None else y + bias.to(y.dtype)).to(x.dtype)


def fixed_matmul_shares(xs: list[torch.Tensor], weights: list[torch.Tensor], sizes: list[int]) -> torch.Tensor:
    return torch.stack(part_sums(xs, weights, sizes)).to(xs[0].dtype)


def branch(
    xs: list[torch.Tensor], weights: list[torch.Tensor], sizes: list[int] | None, rank: int, world: int
) -> torch.Tensor:
    """This rank's branch of the tree over all ranks' virtual shards. sizes: of K, for each i those of all ranks."""
    shards = []
    for i, x in enumerate(xs):
        of_ranks = sizes[i * world : (i + 1) * world] if sizes is not None else [x.shape[1]] * world
        if of_ranks[rank] != x.shape[1]:
            raise ValueError(f"K is {x.shape[1]} in x on rank {rank}, but sizes says {of_ranks[rank]}")
        shards += virtual_shards(of_ranks, rank)
    return tree_sum(part_sums(xs, weights, shards))
