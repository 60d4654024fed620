"""The loss over a vocabulary that is cut over the ranks, and its gradient, without a row of logits leaving its rank.

Kernel 1 reads the own logits once and puts 3 or 4 numbers of each row into every rank's slot [world_size][fields][T],
float32: max, sum of e^(x - max), the target's logit where the target is here, else 0, and, with label smoothing, the
sum of x. Kernel 2 merges them in rank order; kernel 3 adds up the rows. Every rank computes the same from the same
numbers: the same bits. Compiled and executed under emulation; not yet run on a GPU.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import triton
import triton.language as tl

from .matmul_tile import CHUNKS, TYPES, check_bytes
from .signal import finish, full_flag, publish, slot_of, this_call, wait, wait_empty, words_of


@triton.jit
def field_of(
    words, source, field, rows, call, slot_bytes, FIELDS: tl.constexpr, WORLD: tl.constexpr, CHUNKS: tl.constexpr
):
    """float32 [rows] in a rank's slot: one number of each row, as `source` found it in its columns."""
    slot = slot_of(words, call, slot_bytes, WORLD, CHUNKS).to(tl.pointer_type(tl.float32))
    return slot + (tl.cast(source, tl.int64) * FIELDS + field) * rows


@triton.jit
def push_row_stats(
    logits,
    target,
    pointers,
    rank,
    slot_bytes,
    polls,
    rows,
    columns,
    begin,
    ignore_index,
    stride_row,
    stride_column,
    flag_rows,
    FIELDS: tl.constexpr,
    WORLD: tl.constexpr,
    CHUNKS: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """Program p takes flag_rows rows, a multiple of ROWS, and raises flag p. begin: the number of the first column."""
    call = this_call(words_of(pointers, rank))
    free = wait_empty(pointers, rank, call, polls, WORLD, CHUNKS)
    piece = tl.program_id(0)
    last = tl.minimum(piece * flag_rows + flag_rows, rows)
    for row in range(piece * flag_rows, last, ROWS):
        t = row + tl.arange(0, ROWS)
        inside = t < last
        line = logits + t.to(tl.int64) * stride_row
        most = tl.full((ROWS,), float("-inf"), tl.float32)
        exp_sum = tl.zeros((ROWS,), tl.float32)
        total = tl.zeros((ROWS,), tl.float32)
        for column in range(0, columns, COLS):
            c = column + tl.arange(0, COLS)
            mask = inside[:, None] & (c < columns)[None, :]
            at = line[:, None] + c.to(tl.int64)[None, :] * stride_column
            x = tl.load(at, mask, other=float("-inf")).to(tl.float32)
            higher = tl.maximum(most, tl.max(x, 1))
            base = tl.where(higher == float("-inf"), 0.0, higher)  # so that -inf - -inf doesn't come up
            exp_sum = exp_sum * tl.exp(most - base) + tl.sum(tl.exp(x - base[:, None]), 1)
            most = higher
            if FIELDS == 4:
                total += tl.sum(tl.where(mask, x, 0.0), 1)
        wanted = tl.load(target + t, inside, other=ignore_index) - begin
        here = inside & (wanted >= 0) & (wanted < columns)
        x_wanted = tl.load(line + wanted * stride_column, here, other=0.0).to(tl.float32)
        for step in range(WORLD):
            there = words_of(pointers, (rank + 1 + step) % WORLD)
            first = field_of(there, rank, 0, rows, call, slot_bytes, FIELDS, WORLD, CHUNKS) + t
            tl.store(first, most, inside & free)
            tl.store(first + rows, exp_sum, inside & free)
            tl.store(first + 2 * tl.cast(rows, tl.int64), x_wanted, inside & free)
            if FIELDS == 4:
                tl.store(first + 3 * tl.cast(rows, tl.int64), total, inside & free)
    if free:
        for step in range(WORLD):
            there = words_of(pointers, (rank + 1 + step) % WORLD)
            publish(full_flag(there, rank, piece, call, WORLD, CHUNKS), call)


@triton.jit
def merged(
    words,
    t,
    mask,
    rows,
    call,
    slot_bytes,
    FIELDS: tl.constexpr,
    WORLD: tl.constexpr,
    CHUNKS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Of rows t the max, the sum of e^(x - max), the target's logit, the sum of x: over all sources, in rank order."""
    full_max = tl.full((ROWS,), float("-inf"), tl.float32)
    for source in range(WORLD):
        of_source = field_of(words, source, 0, rows, call, slot_bytes, FIELDS, WORLD, CHUNKS) + t
        full_max = tl.maximum(full_max, tl.load(of_source, mask, other=0.0))
    full_sum = tl.zeros((ROWS,), tl.float32)
    x_target = tl.zeros((ROWS,), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    for source in range(WORLD):
        of_source = field_of(words, source, 0, rows, call, slot_bytes, FIELDS, WORLD, CHUNKS) + t
        most = tl.load(of_source, mask, other=0.0)
        exp_sum = tl.load(of_source + rows, mask, other=0.0)
        scale = tl.where(most == full_max, 1.0, tl.exp(most - full_max))
        full_sum += tl.where(exp_sum == 0.0, 0.0, exp_sum * scale)
        x_target += tl.load(of_source + 2 * tl.cast(rows, tl.int64), mask, other=0.0)
        if FIELDS == 4:
            total += tl.load(of_source + 3 * tl.cast(rows, tl.int64), mask, other=0.0)
    return full_max, full_sum, x_target, total


@triton.jit
def merge_row_stats(
    target,
    losses,
    stats,
    pointers,
    rank,
    slot_bytes,
    polls,
    rows,
    vocabulary,
    ignore_index,
    label_smoothing,
    flag_rows,
    FIELDS: tl.constexpr,
    WORLD: tl.constexpr,
    CHUNKS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """losses [rows], 0 where the target is ignored; stats [2, rows]: max and sum of e^(x - max), there 0 and 1.

    Where a peer's numbers didn't come, and for a target outside the vocabulary, the loss is NaN.
    """
    words = words_of(pointers, rank)
    call = this_call(words)
    row = tl.program_id(0) * ROWS
    arrived = True
    for piece in range(row // flag_rows, (tl.minimum(row + ROWS, rows) - 1) // flag_rows + 1):
        for source in range(WORLD):  # pairs with the publish of push_row_stats
            flag = full_flag(words, source, piece, call, WORLD, CHUNKS)
            arrived = arrived & wait(flag, call, pointers, rank, 1, source, piece, polls, WORLD)
    t = row + tl.arange(0, ROWS)
    inside = t < rows
    mask = inside & arrived
    full_max, full_sum, x_target, total = merged(words, t, mask, rows, call, slot_bytes, FIELDS, WORLD, CHUNKS, ROWS)
    wanted = tl.load(target + t, inside, other=ignore_index)
    kept = wanted != ignore_index
    full_max = tl.where(kept, full_max, 0.0)
    full_sum = tl.where(kept, full_sum, 1.0)
    loss = tl.log(full_sum) + (1 - label_smoothing) * (full_max - x_target)
    if FIELDS == 4:
        loss += label_smoothing * (full_max - total / vocabulary)
    known = arrived & (wanted >= 0) & (wanted < vocabulary)
    tl.store(losses + t, tl.where(kept, tl.where(known, loss, float("nan")), 0.0), inside)
    tl.store(stats + t, tl.where(arrived, full_max, float("nan")), inside)
    tl.store(stats + rows + t, tl.where(arrived, full_sum, float("nan")), inside)
    finish(pointers, rank, call, tl.num_programs(0), WORLD, CHUNKS)


@triton.jit
def add_rows(losses, target, result, rows, ignore_index, ROWS: tl.constexpr):
    """result [2]: the sum of the losses, added in float64 and rounded once, and how many rows count. One program."""
    total = tl.zeros((ROWS,), tl.float64)
    count = tl.zeros((ROWS,), tl.int32)
    for row in range(0, rows, ROWS):
        t = row + tl.arange(0, ROWS)
        kept = tl.load(target + t, t < rows, other=ignore_index) != ignore_index
        total += tl.load(losses + t, kept, other=0.0).to(tl.float64)
        count += kept.to(tl.int32)
    tl.store(result, tl.sum(total, 0).to(tl.float32))
    tl.store(result + 1, tl.sum(count, 0).to(tl.float32))


@triton.jit
def gradient(
    logits,
    target,
    stats,
    dloss,
    dlogits,
    rows,
    columns,
    begin,
    vocabulary,
    ignore_index,
    label_smoothing,
    stride_row,
    stride_column,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """dlogits [rows, columns] = (softmax - what the target wants) * dloss; 0 in rows that are ignored."""
    t = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    c = tl.program_id(1) * COLS + tl.arange(0, COLS)
    inside = t < rows
    wanted = tl.load(target + t, inside, other=ignore_index)
    kept = inside & (wanted != ignore_index)
    most = tl.load(stats + t, kept, other=0.0)
    exp_sum = tl.load(stats + rows + t, kept, other=1.0)
    mask = inside[:, None] & (c < columns)[None, :]
    at = t.to(tl.int64)[:, None] * stride_row + c.to(tl.int64)[None, :] * stride_column
    x = tl.load(logits + at, mask & kept[:, None], other=0.0).to(tl.float32)
    softmax = tl.exp(x - most[:, None]) / exp_sum[:, None]
    aim = tl.where(wanted[:, None] - begin == c[None, :], 1 - label_smoothing, 0.0)
    grads = (softmax - aim - label_smoothing / vocabulary) * tl.load(dloss).to(tl.float32)
    value = tl.where(kept[:, None], grads, 0.0).to(dlogits.dtype.element_ty)
    tl.store(dlogits + t.to(tl.int64)[:, None] * columns + c[None, :], value, mask)


@dataclasses.dataclass(frozen=True)
class Config:
    """rows, cols: of the tile in which logits are read; merged: rows of a program that merges or adds."""

    rows: int = 1
    cols: int = 4096
    merged: int = 128
    num_warps: int = 8


def config_on(x: torch.Tensor) -> Config:
    return Config() if x.device.type == "cuda" else Config(rows=16, cols=256, merged=64)


def check_logits(name: str, logits: torch.Tensor, target: torch.Tensor) -> None:
    if logits.dim() != 2 or target.shape != logits.shape[:1]:
        raise ValueError(
            f"{name}: logits [T, V_r] and target [T] don't fit: {list(logits.shape)}, {list(target.shape)}"
        )
    if logits.dtype not in TYPES or target.dtype != torch.int64:
        raise ValueError(
            f"{name} takes logits of float32, float16, bfloat16 and targets of int64, "
            f"got {logits.dtype} and {target.dtype}"
        )


def fields_of(label_smoothing: float) -> int:
    """Numbers of a row that travel."""
    return 4 if label_smoothing > 0 else 3


def vocab_cross_entropy_bytes(T: int, world_size: int, label_smoothing: float) -> int:
    """Of a slot that such a call needs."""
    return world_size * fields_of(label_smoothing) * T * 4


def vocab_cross_entropy(
    logits: torch.Tensor,
    target: torch.Tensor,
    pointers: torch.Tensor,
    rank: int,
    world_size: int,
    slot_bytes: int,
    polls: int,
    begin: int,
    vocabulary: int,
    ignore_index: int,
    label_smoothing: float,
    config: Config | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The sum of the losses, how many there are, and of each row [max, sum of e^(x - max)] as [2, T]; all float32.

    logits [T, V_r], any strides: columns [begin, begin + V_r) of `vocabulary`. target [T], the same on every rank.
    pointers, slot_bytes: of a channel that this op alone uses. A wait ends after `polls` looks; then losses and stats
    are NaN, and the channel's check() raises.
    """
    name = "vocab_cross_entropy"
    check_logits(name, logits, target)
    check_bytes(name, vocab_cross_entropy_bytes(len(target), world_size, label_smoothing), slot_bytes)
    config, (T, columns), target = config or config_on(logits), logits.shape, target.contiguous()
    losses, stats, result = (logits.new_empty(shape, dtype=torch.float32) for shape in (T, (2, T), 2))
    if T:
        flag_rows = -(-T // (config.rows * CHUNKS)) * config.rows
        form: dict[str, Any] = {"FIELDS": fields_of(label_smoothing), "WORLD": world_size, "CHUNKS": CHUNKS}
        push_row_stats[(triton.cdiv(T, flag_rows),)](
            logits, target, pointers, rank, slot_bytes, polls, T, columns, begin, ignore_index, logits.stride(0),
            logits.stride(1), flag_rows, **form, ROWS=config.rows, COLS=config.cols, num_warps=config.num_warps,
        )  # fmt: skip
        merge_row_stats[(triton.cdiv(T, config.merged),)](
            target, losses, stats, pointers, rank, slot_bytes, polls, T, vocabulary, ignore_index, label_smoothing,
            flag_rows, **form, ROWS=config.merged,
        )  # fmt: skip
    add_rows[(1,)](losses, target, result, T, ignore_index, ROWS=1024)
    return result[0], result[1], stats


def vocab_cross_entropy_dlogits(
    logits: torch.Tensor,
    target: torch.Tensor,
    stats: torch.Tensor,
    dloss: torch.Tensor,
    begin: int,
    vocabulary: int,
    ignore_index: int,
    label_smoothing: float,
    config: Config | None = None,
) -> torch.Tensor:
    """The gradient of the own logits; exchanges nothing. stats: as vocab_cross_entropy gave them; dloss []."""
    check_logits("vocab_cross_entropy_dlogits", logits, target)
    config, (T, columns) = config or config_on(logits), logits.shape
    dlogits = logits.new_empty(T, columns)
    if dlogits.numel():
        gradient[(triton.cdiv(T, config.rows), triton.cdiv(columns, config.cols))](
            logits, target.contiguous(), stats.contiguous(), dloss, dlogits, T, columns, begin, vocabulary,
            ignore_index, label_smoothing, logits.stride(0), logits.stride(1), ROWS=config.rows, COLS=config.cols,
            num_warps=config.num_warps,
        )  # fmt: skip
    return dlogits
