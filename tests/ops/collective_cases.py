"""What the tests of the five collectives share: cases, and the checks that every op must pass."""

from __future__ import annotations

import torch
import torch.distributed as dist

FLOATS = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
INTEGERS = [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64]
# Around every threshold: inline line, one cache line, one shot, one slot of 1 MiB, several slots.
SIZES = [0, 1, 3, 8, 9, 17, 1000, 16384, 16385, 40000, 262144, 262145, 700001]


def name() -> str:
    return dist.group.WORLD.group_name


def tensor_of(rank: int, seed: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """The tensor that `rank` holds: every rank can make every rank's."""
    generator = torch.Generator().manual_seed(seed * 1000 + rank)
    if dtype == torch.bool:
        return torch.rand(shape, generator=generator) < 0.5
    if dtype.is_floating_point:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    return torch.randint(0, 50, shape, generator=generator).to(dtype)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    a, b = a.contiguous().reshape(-1), b.contiguous().reshape(-1)
    return torch.equal(a.view(torch.uint8) if a.numel() else a, b.view(torch.uint8) if b.numel() else b)
