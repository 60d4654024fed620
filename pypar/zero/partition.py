"""Which rank owns which elements: flat layouts of parameters and their shards. Pure: no tensors, no groups."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

CACHE_LINE_BYTES = 64
PAGE_BYTES = 4096


@dataclass(frozen=True)
class Piece:
    """The part of one parameter that lies in one rank's shard: elements [begin, end) of the flat layout, which are
    elements [start, start + end - begin) of the parameter."""

    index: int
    begin: int
    end: int
    start: int


@dataclass(frozen=True)
class Layout:
    """Parameters one behind the other, and cut for the ranks.

    offsets   where each parameter begins
    sizes     elements of each
    bounds    rank r owns elements [bounds[r], bounds[r + 1]); the last bound is the whole, padding included
    """

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    bounds: tuple[int, ...]

    @property
    def numel(self) -> int:
        return self.bounds[-1]

    @property
    def world_size(self) -> int:
        return len(self.bounds) - 1

    def shard(self, rank: int) -> tuple[int, int]:
        return self.bounds[rank], self.bounds[rank + 1]

    def shard_sizes(self) -> list[int]:
        return [b - a for a, b in zip(self.bounds, self.bounds[1:], strict=False)]

    def gaps(self) -> Iterator[tuple[int, int]]:
        """Elements that are nobody's."""
        ends = [o + n for o, n in zip(self.offsets, self.sizes, strict=True)]
        for end, start in zip(ends, [*self.offsets[1:], self.numel], strict=False):
            if end < start:
                yield end, start

    def pieces(self, rank: int) -> Iterator[Piece]:
        """What rank owns, in order; without padding."""
        begin, end = self.shard(rank)
        index = max(0, bisect_right(self.offsets, begin) - 1)
        while index < len(self.offsets) and self.offsets[index] < end:
            offset, size = self.offsets[index], self.sizes[index]
            first, last = max(begin, offset), min(end, offset + size)
            if first < last:
                yield Piece(index, first, last, first - offset)
            index += 1


def lay_out(sizes: Sequence[int], world_size: int, item_bytes: int, shard_bytes: int = PAGE_BYTES) -> Layout:
    """Every parameter begins on a cache line; shards are equal, in whole blocks of shard_bytes, so that they are
    gathered without a copy; the last ones may be padding."""
    align = math.lcm(CACHE_LINE_BYTES, item_bytes) // item_bytes
    block = math.lcm(shard_bytes, item_bytes) // item_bytes
    offsets, at = [], 0
    for size in sizes:
        offsets.append(at)
        at += -(-size // align) * align
    size = -(-at // (block * world_size)) * block
    bounds = [r * size for r in range(world_size + 1)]
    return Layout(tuple(offsets), tuple(sizes), tuple(bounds))


def boxes(shape: Sequence[int], begin: int, end: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Elements [begin, end) of a contiguous tensor of that shape, in order, as boxes, each contiguous: offsets and
    sizes; at most 2 * dims - 1 of them."""
    if begin >= end:
        return
    if len(shape) <= 1:
        yield ((begin,), (end - begin,)) if shape else ((), ())
        return
    inner = math.prod(shape[1:])
    first, last = -(-begin // inner), end // inner  # whole rows
    if first > last:  # within one row
        yield from _in_row(shape, last, begin - last * inner, end - last * inner)
        return
    if begin < first * inner:
        yield from _in_row(shape, first - 1, begin - (first - 1) * inner, inner)
    if first < last:
        yield (first, *[0] * (len(shape) - 1)), (last - first, *shape[1:])
    if last * inner < end:
        yield from _in_row(shape, last, 0, end - last * inner)


def _in_row(shape: Sequence[int], row: int, begin: int, end: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    for offsets, sizes in boxes(shape[1:], begin, end):
        yield (row, *offsets), (1, *sizes)
