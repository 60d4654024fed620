"""Parts: the shares of a matmul that every source puts into a slot, [world_size][rows_max][N], and their sum."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .signal import full_flag, slot_of, wait

ACTIVATIONS = ("", "relu", "gelu", "silu")


@triton.jit
def part_of(
    words, source, rows_max, N, call, slot_bytes, DTYPE: tl.constexpr, WORLD: tl.constexpr, CHUNKS: tl.constexpr
):
    """Where `source` puts its share of the rows that the owner of the channel holds: [rows_max, N] in the slot."""
    slot = slot_of(words, call, slot_bytes, WORLD, CHUNKS).to(tl.pointer_type(DTYPE))
    return tl.multiple_of(slot, 16) + tl.cast(source, tl.int64) * rows_max * N


@triton.jit
def scaled(total, x_scale, w_scale, SCALED: tl.constexpr):
    if SCALED:
        total = total * (tl.load(x_scale) * tl.load(w_scale))
    return total


@triton.jit
def arrive(counter, expected, stored):
    """Whether this program is the last of `expected` to come here with its stores done: what the others stored comes
    before what it does next. The counter is 0 again then. A program that could not store (its wait ended) isn't
    counted: nobody is the last, the flag stays down, and the peers' waits end as its own did."""
    tl.debug_barrier()
    step = tl.where(stored, 1, 0)
    last = tl.atomic_add(counter, step, sem="acq_rel", scope="gpu") + step == expected
    if last:
        tl.store(counter, 0)
    return last


@triton.jit
def activated(value, ACTIVATION: tl.constexpr):
    if ACTIVATION == "relu":
        value = tl.where(value < 0, 0.0, value)  # a NaN stays
    elif ACTIVATION == "gelu":
        value = 0.5 * value * (1 + tl.erf(value * 0.7071067811865476))
    elif ACTIVATION == "silu":
        value = value / (1 + tl.exp(-value))
    return value


@triton.jit
def sum_of_parts(
    words,
    m,
    n,
    mask,
    bias,
    residual,
    stride_residual,
    rows_max,
    N,
    call,
    slot_bytes,
    DTYPE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    ACTIVATION: tl.constexpr,
    WORLD: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """Rows m of the shares of all sources in rank order, then bias, residual, activation, in float32; rounded once.

    bias [N]; residual: its first row is row 0 of m.
    """
    at = m.to(tl.int64)[:, None] * N + n[None, :]
    part = part_of(words, 0, rows_max, N, call, slot_bytes, DTYPE, WORLD, CHUNKS)
    total = tl.load(part + at, mask, other=0.0).to(tl.float32)
    for source in range(1, WORLD):
        part = part_of(words, source, rows_max, N, call, slot_bytes, DTYPE, WORLD, CHUNKS)
        total += tl.load(part + at, mask, other=0.0).to(tl.float32)
    if HAS_BIAS:
        total += tl.load(bias + n[None, :], mask, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        at = m.to(tl.int64)[:, None] * stride_residual + n[None, :]
        total += tl.load(residual + at, mask, other=0.0).to(tl.float32)
    return activated(total, ACTIVATION).to(DTYPE)


@triton.jit
def wait_for_parts(words, block, call, pointers, rank, polls, WORLD: tl.constexpr, CHUNKS: tl.constexpr):
    """Pairs with the publish of matmul_to_owners at every source."""
    there = True
    for source in range(WORLD):
        flag = full_flag(words, source, block, call, WORLD, CHUNKS)
        there = there & wait(flag, call, pointers, rank, 1, source, block, polls, WORLD)
    return there


def check_additions(
    name: str, shape: tuple[int, int], bias: torch.Tensor | None, residual: torch.Tensor | None, activation: str
) -> None:
    if bias is not None and (bias.shape != shape[1:] or not bias.is_contiguous()):
        raise ValueError(f"{name}: bias is {list(bias.shape)}, expected [{shape[1]}] without gaps")
    if residual is not None and (residual.shape != shape or (residual.numel() and residual.stride(1) != 1)):
        raise ValueError(f"{name}: residual is {list(residual.shape)}, expected {list(shape)}, columns in line")
    if activation not in ACTIVATIONS:
        raise ValueError(f"{name}: activation {activation!r} is none of {', '.join(map(repr, ACTIVATIONS))}")
