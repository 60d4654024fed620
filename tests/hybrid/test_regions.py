"""Boxes of full tensors against a numbering of their elements."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pypar.hybrid.regions import MOST_BYTES, SHARE_BYTES, Box, in_full, share_out, split, subtract
from pypar.zero.shard_tensor import boxes_of_flat

shapes = st.lists(st.integers(1, 5), min_size=1, max_size=3).map(tuple)


def numbers(shape: tuple[int, ...]) -> torch.Tensor:
    return torch.arange(math.prod(shape)).reshape(shape)


def take(full: torch.Tensor, box: Box) -> torch.Tensor:
    for dim, (offset, size) in enumerate(zip(box.offsets, box.sizes, strict=True)):
        full = full.narrow(dim, offset, size)
    return full


def elements(full: torch.Tensor, boxes: list[Box]) -> list[int]:
    return sorted(int(n) for box in boxes for n in take(full, box).flatten())


@st.composite
def boxes_in(draw: st.DrawFn, shape: tuple[int, ...]) -> Box:
    offsets = tuple(draw(st.integers(0, n - 1)) for n in shape)
    return Box(offsets, tuple(draw(st.integers(1, n - o)) for n, o in zip(shape, offsets, strict=True)))


@st.composite
def cut_tensors(draw: st.DrawFn) -> tuple[tuple[int, ...], int, list[tuple[int, int]], tuple[int, int]]:
    """(full shape, dim, ranges of it that a rank holds, flat elements of the rank's part)"""
    shape = draw(shapes)
    dim = draw(st.integers(0, len(shape) - 1))
    marks = sorted(draw(st.lists(st.integers(0, shape[dim]), min_size=2, max_size=6)))
    ranges = list(zip(marks[::2], marks[1::2], strict=False))
    if draw(st.booleans()):
        ranges.reverse()  # a rank may hold them in any order
    held = sum(b - a for a, b in ranges)
    numel = math.prod(shape) // shape[dim] * held
    start = draw(st.integers(0, numel))
    return shape, dim, ranges, (start, draw(st.integers(start, numel)))


@settings(max_examples=300, deadline=None)
@given(cut_tensors())
def test_a_flat_part_of_a_cut_tensor_lies_where_the_numbers_say(case):
    shape, dim, ranges, (start, stop) = case
    full = numbers(shape)
    local = torch.cat([full.narrow(dim, a, b - a) for a, b in ranges], dim)
    flat = local.reshape(-1)[start:stop]
    seen = []
    for offsets, view in boxes_of_flat(local.shape, start, flat):
        for box, begin, size in in_full(Box(offsets, tuple(view.shape)), dim, ranges):
            part = view.narrow(dim, begin, size)
            assert torch.equal(take(full, box), part)
            assert part.untyped_storage().data_ptr() == flat.untyped_storage().data_ptr()
            seen += part.flatten().tolist()
    assert sorted(seen) == sorted(flat.tolist())


@settings(max_examples=300, deadline=None)
@given(shapes.flatmap(lambda s: st.tuples(st.just(s), boxes_in(s), boxes_in(s))))
def test_subtract_leaves_what_is_in_one_alone(case):
    shape, one, other = case
    full = numbers(shape)
    wanted = set(elements(full, [one])) - set(elements(full, [other]))
    assert elements(full, list(subtract(one, other))) == sorted(wanted)
    assert one.meets(other) == (set(elements(full, [one])) != wanted)
    assert one.holds(other) == (set(elements(full, [other])) <= set(elements(full, [one])))


@settings(max_examples=200, deadline=None)
@given(shapes.flatmap(lambda s: st.tuples(st.just(s), boxes_in(s), st.integers(1, 9))))
def test_split_makes_parts_of_the_box(case):
    shape, box, parts = case
    found = list(split(box, parts))
    assert elements(numbers(shape), found) == elements(numbers(shape), [box])
    assert len(found) <= parts


@settings(max_examples=300, deadline=None)
@given(
    shapes.flatmap(
        lambda s: st.tuples(
            st.just(s), st.lists(st.lists(boxes_in(s), max_size=3), min_size=1, max_size=4), st.booleans()
        )
    ),
    st.sampled_from([1, 8, SHARE_BYTES, MOST_BYTES]),
)
def test_share_out_writes_every_element_once(case, item_bytes):
    shape, held, spread = case
    full = numbers(shape)
    everyone = set(elements(full, [box for boxes in held for box in boxes]))
    load = [0] * len(held)
    if len(everyone) < full.numel():
        with pytest.raises(ValueError, match=f"{full.numel() - len(everyone)} of its {full.numel()} elements"):
            share_out(held, full.numel(), item_bytes, load, spread)
        return
    found = share_out(held, full.numel(), item_bytes, load, spread)
    assert elements(full, [box for boxes in found for box in boxes]) == list(range(full.numel()))
    for rank, boxes in enumerate(found):
        assert set(elements(full, boxes)) <= set(elements(full, held[rank]))
        assert load[rank] == sum(box.numel for box in boxes) * item_bytes
        assert all(any(whole.holds(box) for whole in held[rank]) for box in boxes)


def test_replicas_share_the_work():
    box = Box((0, 0), (1024, 256))
    load = [0] * 4
    share_out([[box]] * 4, box.numel, 4, load)
    assert load == [box.numel] * 4
    for _ in range(8):  # too small to be cut: they go round
        small = Box((0,), (100,))
        share_out([[small]] * 4, 100, 4, load)
    assert load == [box.numel + 800] * 4
    load = [0] * 4
    share_out([[box]] * 4, box.numel, 4, load, spread=False)
    assert load == [box.numel * 4, 0, 0, 0]


def test_a_large_part_is_written_in_several():
    box = Box((0, 0), (64, 1 << 20))
    (found,) = share_out([[box]], box.numel, 4, [0])
    assert len(found) == 8 and max(b.numel * 4 for b in found) <= MOST_BYTES
