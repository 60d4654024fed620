"""y = x of rank 0 op x of rank 1 op ..., on every rank: short vectors whole to everybody, long ones by way of owners.

One kernel either way: program p pushes piece p, and then waits for piece p of the peers, that is, for the peers'
programs p. There are few programs, so that all of a grid run at the same time, and their number depends on the length
alone. Halves are added in float32; one rounding. Compiled and executed under emulation; not yet run on a GPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .matmul_tile import CHUNKS, TYPES, check_bytes
from .signal import finish, full_flag, publish, slot_of, this_call, wait, wait_empty, words_of

OPS = ("sum", "avg", "min", "max", "product")
PROGRAMS = 64  # at most: any GPU of a server runs so many blocks at the same time
HALF: tl.constexpr = tl.constexpr(128)  # flags 0..127 of a source are for what it has, 128..255 for its results


@triton.jit
def part_of(words, part, stride, call, slot_bytes, DTYPE: tl.constexpr, WORLD: tl.constexpr, CHUNKS: tl.constexpr):
    """Part `part` of a rank's slot, `stride` elements after the one before."""
    slot = slot_of(words, call, slot_bytes, WORLD, CHUNKS).to(tl.pointer_type(DTYPE))
    return tl.multiple_of(slot, 16) + tl.cast(part, tl.int64) * stride


@triton.jit
def combined(a, b, OP: tl.constexpr):
    """Of 0.0 and -0.0 min and max take a, and a NaN stays."""
    if OP == "min":
        result = tl.where((b < a) | (b != b), b, a)
    elif OP == "max":
        result = tl.where((b > a) | (b != b), b, a)
    elif OP == "product":
        result = a * b
    else:
        result = a + b
    return result


@triton.jit
def reduced(
    words,
    at,
    mask,
    stride,
    call,
    slot_bytes,
    OP: tl.constexpr,
    DTYPE: tl.constexpr,
    WORLD: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """Elements `at` of what all sources put into the slot, in rank order."""
    part = part_of(words, 0, stride, call, slot_bytes, DTYPE, WORLD, CHUNKS)
    total = tl.load(part + at, mask, other=0.0).to(tl.float32)
    for source in range(1, WORLD):
        part = part_of(words, source, stride, call, slot_bytes, DTYPE, WORLD, CHUNKS)
        total = combined(total, tl.load(part + at, mask, other=0.0).to(tl.float32), OP)
    if OP == "avg":
        total = total * (1.0 / WORLD)
    return total.to(DTYPE)


@triton.jit
def wait_for_all(words, piece, call, pointers, rank, polls, WORLD: tl.constexpr, CHUNKS: tl.constexpr):
    """Pairs with the publish of the same piece at every source."""
    there = True
    for source in range(WORLD):
        flag = full_flag(words, source, piece, call, WORLD, CHUNKS)
        there = there & wait(flag, call, pointers, rank, 1, source, piece, polls, WORLD)
    return there


@triton.jit
def all_reduce_in_one_shot(
    x,
    y,
    pointers,
    rank,
    slot_bytes,
    polls,
    numel,
    stride,
    span,
    OP: tl.constexpr,
    DTYPE: tl.constexpr,
    WORLD: tl.constexpr,
    CHUNKS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The slot is [world_size][stride]; a piece is `span` elements, whole blocks."""
    words = words_of(pointers, rank)
    call = this_call(words)
    free = wait_empty(pointers, rank, call, polls, WORLD, CHUNKS)
    piece = tl.program_id(0)
    first = tl.cast(piece, tl.int64) * span
    for block in range(0, span, BLOCK):
        at = first + block + tl.arange(0, BLOCK)
        value = tl.load(x + at, at < numel, other=0.0)
        for step in range(WORLD):
            there = words_of(pointers, (rank + 1 + step) % WORLD)
            part = part_of(there, rank, stride, call, slot_bytes, DTYPE, WORLD, CHUNKS)
            tl.store(part + at, value, (at < stride) & free)
    if free:
        for step in range(WORLD):
            there = words_of(pointers, (rank + 1 + step) % WORLD)
            publish(full_flag(there, rank, piece, call, WORLD, CHUNKS), call)
    arrived = wait_for_all(words, piece, call, pointers, rank, polls, WORLD, CHUNKS)
    for block in range(0, span, BLOCK):
        at = first + block + tl.arange(0, BLOCK)
        value = reduced(words, at, (at < stride) & arrived, stride, call, slot_bytes, OP, DTYPE, WORLD, CHUNKS)
        tl.store(y + at, value, (at < numel) & arrived)
    finish(pointers, rank, call, tl.num_programs(0), WORLD, CHUNKS)


@triton.jit
def all_reduce_in_two_shots(
    x,
    y,
    pointers,
    rank,
    slot_bytes,
    polls,
    numel,
    stride,
    span,
    OP: tl.constexpr,
    DTYPE: tl.constexpr,
    WORLD: tl.constexpr,
    CHUNKS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Rank r owns elements [r * stride, (r + 1) * stride). The slot is [2][world_size][stride]: what the sources have
    of the own elements, then every owner's results. A piece is `span` elements of each owner."""
    words = words_of(pointers, rank)
    call = this_call(words)
    free = wait_empty(pointers, rank, call, polls, WORLD, CHUNKS)
    piece = tl.program_id(0)
    first = tl.cast(piece, tl.int64) * span
    for step in range(WORLD):
        owner = (rank + 1 + step) % WORLD
        there = words_of(pointers, owner)
        begin = tl.cast(owner, tl.int64) * stride
        part = part_of(there, rank, stride, call, slot_bytes, DTYPE, WORLD, CHUNKS)
        for block in range(0, span, BLOCK):
            at = first + block + tl.arange(0, BLOCK)
            value = tl.load(x + begin + at, (at < stride) & (begin + at < numel), other=0.0)
            tl.store(part + at, value, (at < stride) & free)
        if free:
            publish(full_flag(there, rank, piece, call, WORLD, CHUNKS), call)
    arrived = wait_for_all(words, piece, call, pointers, rank, polls, WORLD, CHUNKS)
    for block in range(0, span, BLOCK):
        at = first + block + tl.arange(0, BLOCK)
        mask = (at < stride) & arrived
        value = reduced(words, at, mask, stride, call, slot_bytes, OP, DTYPE, WORLD, CHUNKS)
        for step in range(WORLD):
            there = words_of(pointers, (rank + 1 + step) % WORLD)
            part = part_of(there, WORLD + rank, stride, call, slot_bytes, DTYPE, WORLD, CHUNKS)
            tl.store(part + at, value, mask & free)
    if arrived & free:
        for step in range(WORLD):
            there = words_of(pointers, (rank + 1 + step) % WORLD)
            publish(full_flag(there, rank, piece + HALF, call, WORLD, CHUNKS), call)
    arrived = wait_for_all(words, piece + HALF, call, pointers, rank, polls, WORLD, CHUNKS)
    for owner in range(WORLD):
        begin = tl.cast(owner, tl.int64) * stride
        part = part_of(words, WORLD + owner, stride, call, slot_bytes, DTYPE, WORLD, CHUNKS)
        for block in range(0, span, BLOCK):
            at = first + block + tl.arange(0, BLOCK)
            mask = (at < stride) & arrived
            tl.store(y + begin + at, tl.load(part + at, mask, other=0.0), mask & (begin + at < numel))
    finish(pointers, rank, call, tl.num_programs(0), WORLD, CHUNKS)


def part_elements(numel: int, world_size: int, dtype: torch.dtype, algorithm: str) -> int:
    """Of a part of a slot: all, or one owner's. A multiple of 16 elements, which lets Triton store 16 bytes at once to
    the peers whatever the length; only accesses to x and y shrink with an odd one."""
    most = numel if algorithm == "one_shot" else -(-numel // world_size)
    return -(-most // 16) * 16


def all_reduce_bytes(numel: int, world_size: int, dtype: torch.dtype, algorithm: str) -> int:
    """Of a slot that such a call needs."""
    parts = world_size if algorithm == "one_shot" else 2 * world_size
    return parts * part_elements(numel, world_size, dtype, algorithm) * dtype.itemsize


def all_reduce(
    x: torch.Tensor,
    op: str,
    algorithm: str,
    pointers: torch.Tensor,
    rank: int,
    world_size: int,
    slot_bytes: int,
    polls: int,
    block: int = 0,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """y, as x, which has no gaps. algorithm: "one_shot" or "two_shot"; out: where y goes, x itself at will.

    pointers, slot_bytes: of a channel that this op and algorithm alone use. block: elements that a program moves at
    once, a power of two; 0: chosen. A wait ends after `polls` looks; then nothing more is written to y, and the
    channel's check() raises.
    """
    if x.dtype not in TYPES or op not in OPS or algorithm not in ("one_shot", "two_shot"):
        raise ValueError(
            f"all_reduce takes float32, float16, bfloat16, {', '.join(OPS)}, and one_shot or two_shot; "
            f"got {x.dtype}, '{op}', '{algorithm}'"
        )
    y = torch.empty_like(x) if out is None else out
    if not x.is_contiguous() or not y.is_contiguous() or y.shape != x.shape or y.dtype != x.dtype:
        raise ValueError(f"all_reduce: x {list(x.shape)} and out {list(y.shape)} must be alike, without gaps")
    check_bytes("all_reduce", all_reduce_bytes(x.numel(), world_size, x.dtype, algorithm), slot_bytes)
    if not x.numel():
        return y
    block = block or 4096 // x.element_size()
    stride = part_elements(x.numel(), world_size, x.dtype, algorithm)
    span = -(-stride // (block * PROGRAMS)) * block
    kernel = all_reduce_in_one_shot if algorithm == "one_shot" else all_reduce_in_two_shots
    kernel[(triton.cdiv(stride, span),)](
        x, y, pointers, rank, slot_bytes, polls, x.numel(), stride, span, OP=op, DTYPE=TYPES[x.dtype],
        WORLD=world_size, CHUNKS=CHUNKS, BLOCK=block,
    )  # fmt: skip
    return y
