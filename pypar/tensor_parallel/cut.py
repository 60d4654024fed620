"""Which indices of a dim each rank holds: the one description of a shard that layers, loading and gathering share."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from pypar.ops.library import VIRTUAL_SHARDS

Range = tuple[int, int]


@dataclass(frozen=True)
class Cut:
    """ranges[r] = the (start, stop) ranges of the full dim that rank r holds, in the order it holds them.

    Several ranges: fused weights (q | k | v), of which a rank holds a piece each. Ranges that overlap between ranks:
    copies (key and value heads that several ranks read), whose gradients are summed over the holders.
    """

    full: int
    ranges: tuple[tuple[Range, ...], ...]

    @property
    def world_size(self) -> int:
        return len(self.ranges)

    def sizes(self) -> list[int]:
        return [sum(stop - start for start, stop in mine) for mine in self.ranges]

    def indices(self, rank: int) -> list[int]:
        return [i for start, stop in self.ranges[rank] for i in range(start, stop)]

    def take(self, full: torch.Tensor, rank: int, dim: int) -> torch.Tensor:
        """Rank `rank`'s part of `full`; a view where that is one range."""
        pieces = [full.narrow(dim, start, stop - start) for start, stop in self.ranges[rank]]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim)

    def put(self, joined: torch.Tensor, dim: int) -> torch.Tensor:
        """The full tensor from all ranks' parts, joined in rank order along `dim`."""
        if self.in_order():
            return joined
        held = [i for rank in range(self.world_size) for i in self.indices(rank)]
        positions = {i: at for at, i in enumerate(held)}  # of copies any one will do: they are equal
        order = torch.tensor([positions[i] for i in range(self.full)], dtype=torch.int64, device=joined.device)
        return joined.index_select(dim, order)

    def in_order(self) -> bool:
        """The ranks' parts, one behind the other, are the full dim."""
        at = 0
        for mine in self.ranges:
            for start, stop in mine:
                if start != stop:
                    if start != at:
                        return False
                    at = stop
        return at == self.full

    def has_copies(self) -> bool:
        return sum(self.sizes()) > self.full

    def copied(self, rank: int) -> tuple[list[int], list[int], int]:
        """Of the indices that several ranks hold: where they lie in rank's part, where in the list of all such, and
        how many such there are."""
        return _copied(self, rank)

    def first_held(self, rank: int) -> list[int]:
        """Where in rank's part lie the indices that no lower rank holds."""
        return _first_held(self, rank)


@functools.cache  # asked for in every backward
def _copied(cut: Cut, rank: int) -> tuple[list[int], list[int], int]:
    holders = [0] * cut.full
    for other in range(cut.world_size):
        for i in cut.indices(other):
            holders[i] += 1
    number = {i: n for n, i in enumerate(i for i, count in enumerate(holders) if count > 1)}
    here = [(at, number[i]) for at, i in enumerate(cut.indices(rank)) if i in number]
    return [at for at, _ in here], [n for _, n in here], len(number)


@functools.cache
def _first_held(cut: Cut, rank: int) -> list[int]:
    lower = {i for other in range(rank) for i in cut.indices(other)}
    return [at for at, i in enumerate(cut.indices(rank)) if i not in lower]


def split_evenly(count: int, parts: int) -> list[Range]:
    """The first count % parts ranges are one longer, as torch.tensor_split; some are empty when parts > count."""
    base, more = divmod(count, parts)
    starts = [r * base + min(r, more) for r in range(parts + 1)]
    return [(starts[r], starts[r + 1]) for r in range(parts)]


def even_cut(
    full: int,
    world_size: int,
    unit: int = 1,
    sizes: Sequence[int] | None = None,
    what: str = "dim",
    determinism: str = "run",
) -> Cut:
    """Consecutive shares: `sizes` as given, else whole units, as equal as they go. determinism "layout": of units of 1,
    whole virtual shards."""
    if sizes is not None:
        if len(sizes) != world_size or sum(sizes) != full or min(sizes) < 0:
            raise ValueError(
                f"sizes {list(sizes)} don't cut {what} = {full} for {world_size} ranks: give {world_size} sizes that "
                f"add up to {full}"
            )
        stops = [sum(sizes[: r + 1]) for r in range(world_size)]
        return Cut(full, tuple(((stop - size, stop),) for size, stop in zip(sizes, stops, strict=True)))
    if unit < 1 or full % unit:
        raise ValueError(f"{what} = {full} isn't made of whole units of {unit}")
    if determinism == "layout" and unit == 1 and VIRTUAL_SHARDS % world_size == 0:
        shards, per = split_evenly(full, VIRTUAL_SHARDS), VIRTUAL_SHARDS // world_size
        return Cut(full, tuple(((shards[r * per][0], shards[(r + 1) * per - 1][1]),) for r in range(world_size)))
    return Cut(full, tuple(((a * unit, b * unit),) for a, b in split_evenly(full // unit, world_size)))


def packed_cut(blocks: Sequence[Cut]) -> Cut:
    """Blocks that lie one behind the other in one dim, each cut by itself."""
    ranges: list[list[Range]] = [[] for _ in range(blocks[0].world_size)]
    offset = 0
    for block in blocks:
        for rank, mine in enumerate(block.ranges):
            ranges[rank] += [(offset + start, offset + stop) for start, stop in mine]
        offset += block.full
    return Cut(offset, tuple(tuple(mine) for mine in ranges))
