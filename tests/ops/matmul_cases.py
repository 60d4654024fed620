"""What the tests of the fused matmuls share."""

from __future__ import annotations

import torch

FLOATS = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
# (M, K, N) of the whole product: no rows, fewer than ranks, odd, more than one piece of shared memory, rows that don't
# fit in a piece.
SHAPES = [(0, 5, 7), (1, 3, 2), (2, 8, 8), (5, 17, 9), (127, 33, 65), (129, 64, 31), (3001, 257, 129), (5, 2, 300_001)]


def rows_of(total: int, world: int) -> list[int]:
    """Uneven on purpose: rank 0 holds most, the last may hold none."""
    if world == 1:
        return [total]
    first = (2 * total + world - 1) // world if world > 2 else total - total // 3
    counts = [min(first, total)]
    for _ in range(world - 1):
        counts.append(min(-(-total // world), total - sum(counts)))
    counts[-1] += total - sum(counts)
    return counts


def matrix(seed: int, rows: int, cols: int, dtype: torch.dtype, integers: bool = False) -> torch.Tensor:
    """The same on every rank. integers: small enough that every product and sum is exact."""
    generator = torch.Generator().manual_seed(seed)
    if integers:
        return torch.randint(-2, 3, (rows, cols), generator=generator).to(dtype)
    return torch.randn(rows, cols, generator=generator, dtype=torch.float64).to(dtype)


def share(full: torch.Tensor, rank: int, world: int, dim: int) -> torch.Tensor:
    """A rank's columns or rows, sizes that differ by one when they don't divide."""
    return full.tensor_split(world, dim)[rank]


def close(actual: torch.Tensor, exact: torch.Tensor, size: int, what: object) -> None:
    """Within what a matmul over `size` terms in that dtype may be off by, given terms of about one."""
    eps = torch.finfo(actual.dtype).eps
    tolerance = 8 * eps * max(1, size) ** 0.5
    error = (actual.double() - exact.double()).abs()
    scale = exact.double().abs() + max(1, size) ** 0.5
    assert actual.shape == exact.shape, (actual.shape, exact.shape, what)
    assert not (error > tolerance * scale).any(), (what, error.max().item())
