"""Dropout whose mask is a function of (seed, site, index in the full tensor), by Philox 4x32-10."""

from __future__ import annotations

import torch

_MULTIPLIERS, _STEPS = (0xD2511F53, 0xCD9E8D57), (0x9E3779B9, 0xBB67AE85)
_LOW = 0xFFFFFFFF


def philox(block: torch.Tensor, site: int, seed: int) -> torch.Tensor:
    """4 random words of 32 bits for each block [n] int64, as [n, 4] int64: counter (block, site), key seed."""
    a, b = block & _LOW, block >> 32 & _LOW
    c, d = torch.full_like(block, site & _LOW), torch.full_like(block, site >> 32 & _LOW)
    key = [seed & _LOW, seed >> 32 & _LOW]
    for _ in range(10):
        (p_high, p_low), (q_high, q_low) = (_multiply(x, m) for x, m in zip((a, c), _MULTIPLIERS, strict=True))
        a, b, c, d = q_high ^ b ^ key[0], q_low, p_high ^ d ^ key[1], p_low
        key = [(k + step) & _LOW for k, step in zip(key, _STEPS, strict=True)]
    return torch.stack([a, b, c, d], -1)


def _multiply(x: torch.Tensor, by: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The high and the low 32 bits of x * by, in halves of 16 bits, since int64 has no sign to spare."""
    low, high = x * (by & 0xFFFF), x * (by >> 16)
    low, high = low + (high << 16 & _LOW), high >> 16
    return high + (low >> 32) & _LOW, low & _LOW


def full_indices(x: torch.Tensor, dim: int, full: int, ranges: list[int]) -> torch.Tensor:
    """Where each element of x lies in the full tensor, of which x has `ranges` (start, stop, ...) of `dim`."""
    if len(ranges) % 2 or any(not 0 <= a <= b <= full for a, b in zip(ranges[::2], ranges[1::2], strict=True)):
        raise ValueError(f"keyed_dropout: ranges {ranges} are not pairs of start and stop in the full dim of {full}")
    held = [i for a, b in zip(ranges[::2], ranges[1::2], strict=True) for i in range(a, b)]
    if not 0 <= dim < x.dim() or len(held) != x.shape[dim]:
        raise ValueError(f"keyed_dropout: ranges {ranges} don't fit dim {dim} of x {tuple(x.shape)}")
    sizes = [full if d == dim else n for d, n in enumerate(x.shape)]
    index = torch.zeros(x.shape, dtype=torch.int64, device=x.device)
    for d, n in enumerate(x.shape):
        here = torch.tensor(held if d == dim else range(n), dtype=torch.int64, device=x.device)
        index = index * sizes[d] + here.view([-1 if e == d else 1 for e in range(x.dim())])
    return index


def keyed_dropout(
    x: torch.Tensor, seed: torch.Tensor, site: int, p: float, dim: int, full: int, ranges: list[int]
) -> torch.Tensor:
    """x / (1 - p) where the word of the element's index is at least p * 2^32, else 0."""
    if not 0 <= p <= 1:
        raise ValueError(f"keyed_dropout: p is {p}, expected a probability from 0 to 1")
    index = full_indices(x, dim, full, ranges).flatten()
    words = philox(index // 4, site, int(seed)).gather(1, (index % 4)[:, None])
    kept = (words >= int(p * 2**32)).view(x.shape)
    wide = x if x.dtype == torch.float64 else x.float()
    return torch.where(kept, wide * (1 / (1 - p) if p < 1 else 0.0), 0).to(x.dtype).contiguous()
