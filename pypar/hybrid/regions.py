"""Boxes of full tensors: where a rank's part lies in them, and which rank writes what. Pure: no tensors, no groups."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

SHARE_BYTES = 64 << 10  # what several ranks hold is shared out among them in parts of this size at least
MOST_BYTES = 32 << 20  # of one part: a rank that loads reads whole parts


@dataclass(frozen=True, slots=True)
class Box:
    """Elements offsets[d] <= index[d] < offsets[d] + sizes[d] of a tensor."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.sizes)

    def part(self, dim: int, start: int, size: int) -> Box:
        """Of `dim`, `size` indices from the box's `start` on."""
        offsets, sizes = list(self.offsets), list(self.sizes)
        offsets[dim] += start
        sizes[dim] = size
        return Box(tuple(offsets), tuple(sizes))

    def meets(self, other: Box) -> bool:
        return all(
            a < b + m and b < a + n
            for a, n, b, m in zip(self.offsets, self.sizes, other.offsets, other.sizes, strict=True)
        )

    def holds(self, other: Box) -> bool:
        return all(
            a <= b and b + m <= a + n
            for a, n, b, m in zip(self.offsets, self.sizes, other.offsets, other.sizes, strict=True)
        )


def in_full(local: Box, dim: int, ranges: Sequence[tuple[int, int]]) -> Iterator[tuple[Box, int, int]]:
    """Where a box of a rank's part lies in the full tensor, of whose `dim` the rank holds `ranges`, (start, stop) one
    behind the other: (box of the full tensor, where its part of the local box begins in `dim`, its size there)."""
    begin, end = local.offsets[dim], local.offsets[dim] + local.sizes[dim]
    at = 0
    for start, stop in ranges:
        first, last = max(begin, at), min(end, at + stop - start)
        if first < last:
            offsets, sizes = list(local.offsets), list(local.sizes)
            offsets[dim], sizes[dim] = start + first - at, last - first
            yield Box(tuple(offsets), tuple(sizes)), first - begin, last - first
        at += stop - start


def subtract(box: Box, other: Box) -> Iterator[Box]:
    """What of `box` is not in `other`, as at most two boxes per dim."""
    if not box.meets(other):
        yield box
        return
    for dim in range(len(box.sizes)):
        begin, end = box.offsets[dim], box.offsets[dim] + box.sizes[dim]
        first, last = max(begin, other.offsets[dim]), min(end, other.offsets[dim] + other.sizes[dim])
        if begin < first:
            yield box.part(dim, 0, first - begin)
        if last < end:
            yield box.part(dim, last - begin, end - last)
        box = box.part(dim, first - begin, last - first)


def are_apart(boxes: Sequence[Box]) -> bool:
    """No two have an element in common. By a sweep along the dim in which they begin at the most places."""
    if len(boxes) < 2:
        return True
    dim = max(range(len(boxes[0].sizes)), key=lambda d: len({box.offsets[d] for box in boxes}))
    active: list[Box] = []
    for box in sorted(boxes, key=lambda box: box.offsets[dim]):
        active = [each for each in active if box.offsets[dim] < each.offsets[dim] + each.sizes[dim]]
        if any(box.meets(each) for each in active):
            return False
        active.append(box)
    return True


def split(box: Box, parts: int) -> Iterator[Box]:
    """About so many parts of it, along its first dim that has enough indices, or else its longest."""
    if parts <= 1:
        yield box
        return
    dims = range(len(box.sizes))
    dim = next((d for d in dims if box.sizes[d] >= parts), max(dims, key=lambda d: box.sizes[d]))
    size = box.sizes[dim]
    parts = min(parts, size)
    for start, stop in pairwise(size * n // parts for n in range(parts + 1)):
        yield box.part(dim, start, stop - start)


def share_out(
    held: Sequence[Sequence[Box]], numel: int, item_bytes: int, load: list[int], spread: bool = True
) -> list[list[Box]]:
    """What of a tensor of `numel` elements each rank writes, of what it holds: every element once.

    held    by rank
    load    bytes that each rank writes so far, to which these are added: the least loaded holder writes
    spread  False: of several holders always the first, so that what differs between them is one rank's
    Raises ValueError where elements are nobody's.
    """
    holders: dict[Box, list[int]] = {}
    for rank, boxes in enumerate(held):
        for box in boxes:
            if box.numel:
                holders.setdefault(box, []).append(rank)
    parts = list(holders.items())
    if not are_apart(list(holders)):  # then each is what the ones before it have not
        done: list[Box] = []
        parts = []
        for box, ranks in holders.items():
            rest = [box]
            for other in done:
                rest = [piece for each in rest for piece in subtract(each, other)]
            done += rest
            parts += [(piece, ranks) for piece in rest]
    missing = numel - sum(box.numel for box, _ in parts)
    if missing:
        raise ValueError(f"{missing} of its {numel} elements are on no rank")
    found: list[list[Box]] = [[] for _ in held]
    for box, ranks in parts:
        num_bytes = box.numel * item_bytes
        shares = min(len(ranks), num_bytes // SHARE_BYTES) if spread else 1
        for piece in split(box, max(shares, -(-num_bytes // MOST_BYTES))):
            rank = min(ranks, key=lambda r: load[r]) if spread else ranks[0]
            found[rank].append(piece)
            load[rank] += piece.numel * item_bytes
    return found
