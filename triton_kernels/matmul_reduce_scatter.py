"""y = this rank's rows of the sum over ranks of x_r @ w_r.T: tiles go straight into their owner's slot.

Kernel 1 multiplies for the owner rank + 1 first and for itself last. Kernel 2 adds the shares of the own rows. The slot
is [world_size][rows_max][N], one part for each source. Compiled and executed under emulation; not yet run on a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from .matmul_parts import arrive, check_additions, part_of, scaled, sum_of_parts, wait_for_parts
from .matmul_tile import (
    CHUNKS,
    TYPES,
    Config,
    check_bytes,
    check_operands,
    config_on,
    flag_tiles_of,
    let_descriptors_allocate,
    product,
    programs_of,
    result_type,
    rows_by_rank,
    starts_table,
    tile_at,
    tile_options,
    tma_of_w,
    tma_of_x,
    weight_of,
    with_rows_in_line,
)
from .signal import finish, full_flag, publish, this_call, wait_empty, words_of


@triton.jit
def matmul_to_owners(
    x,
    w,
    x_scale,
    w_scale,
    starts,
    counters,
    pointers,
    rank,
    slot_bytes,
    polls,
    M,
    N,
    K,
    stride_xm,
    stride_n,
    stride_k,
    rows_max,
    flag_tiles,
    tiles,
    WORLD: tl.constexpr,
    CHUNKS: tl.constexpr,
    DTYPE: tl.constexpr,
    SCALED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    IMPRECISE: tl.constexpr,
    X_TMA: tl.constexpr,
    W_TMA: tl.constexpr,
):
    """A flag stands for `flag_tiles` tiles of rows; whoever stores the last tile of them raises it."""
    call = this_call(words_of(pointers, rank))
    free = wait_empty(pointers, rank, call, polls, WORLD, CHUNKS)
    xs = tl.make_tensor_descriptor(x, [M, K], [stride_xm, 1], [BLOCK_M, BLOCK_K]) if X_TMA else x
    ws = weight_of(w, N, K, stride_n, stride_k, BLOCK_N, BLOCK_K, W_TMA)
    tiles_n = tl.cdiv(N, BLOCK_N)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        owner = rank
        index = tile
        before = 0
        for step in range(WORLD):
            candidate = (rank + 1 + step) % WORLD
            has = tl.cdiv(tl.load(starts + candidate + 1) - tl.load(starts + candidate), BLOCK_M) * tiles_n
            here = (tile >= before) & (tile < before + has)
            owner = tl.where(here, candidate, owner)
            index = tl.where(here, tile - before, index)
            before += has
        first = tl.load(starts + owner)
        count = tl.load(starts + owner + 1) - first
        tiles_m = tl.cdiv(count, BLOCK_M)
        tile_m, tile_n = tile_at(index, tiles_m, tiles_n, GROUP_M)
        total = product(
            xs,
            ws,
            first + tile_m * BLOCK_M,
            tile_n * BLOCK_N,
            first + count,
            N,
            K,
            stride_xm,
            stride_n,
            stride_k,
            BLOCK_M,
            BLOCK_N,
            BLOCK_K,
            X_TMA,
            W_TMA,
            IMPRECISE,
        )
        there = words_of(pointers, owner)
        m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
        n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
        part = part_of(there, rank, rows_max, N, call, slot_bytes, DTYPE, WORLD, CHUNKS)
        value = scaled(total, x_scale, w_scale, SCALED).to(DTYPE)
        tl.store(part + m.to(tl.int64)[:, None] * N + n[None, :], value, (m < count)[:, None] & (n < N)[None, :] & free)
        block = tile_m // flag_tiles
        expected = tl.minimum(tiles_m - block * flag_tiles, flag_tiles) * tiles_n
        if arrive(counters + owner * CHUNKS + block, expected, free):
            publish(full_flag(there, rank, block, call, WORLD, CHUNKS), call)


@triton.jit
def reduce_own_rows(
    y,
    bias,
    residual,
    stride_residual,
    pointers,
    rank,
    slot_bytes,
    polls,
    count,
    N,
    rows_max,
    flag_rows,
    WORLD: tl.constexpr,
    CHUNKS: tl.constexpr,
    DTYPE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """y [count, N]; a flag stands for `flag_rows` rows, a multiple of ROWS."""
    words = words_of(pointers, rank)
    call = this_call(words)
    tiles_n = tl.cdiv(N, COLS)
    seen = -1
    there = True
    for tile in range(tl.program_id(0), tl.cdiv(count, ROWS) * tiles_n, tl.num_programs(0)):
        row = tile // tiles_n * ROWS
        if row // flag_rows != seen:
            seen = row // flag_rows
            there = there & wait_for_parts(words, seen, call, pointers, rank, polls, WORLD, CHUNKS)
        m = row + tl.arange(0, ROWS)
        n = tile % tiles_n * COLS + tl.arange(0, COLS)
        mask = (m < count)[:, None] & (n < N)[None, :] & there
        value = sum_of_parts(
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
            DTYPE,
            HAS_BIAS,
            HAS_RESIDUAL,
            ACTIVATION,
            WORLD,
            CHUNKS,
        )
        tl.store(y + m.to(tl.int64)[:, None] * N + n[None, :], value, mask)
    finish(pointers, rank, call, tl.num_programs(0), WORLD, CHUNKS)


def matmul_reduce_scatter_bytes(
    M: int, N: int, world_size: int, dtype: torch.dtype, splits: Sequence[int] | None = None
) -> int:
    """Of a slot that such a call needs; dtype: of the result."""
    return world_size * max(rows_by_rank(M, world_size, splits)) * N * dtype.itemsize


def multiply_for_owners(
    x: torch.Tensor,
    w: torch.Tensor,
    x_scale: torch.Tensor | None,
    w_scale: torch.Tensor | None,
    rows: tuple[int, ...],
    pointers: torch.Tensor,
    rank: int,
    slot_bytes: int,
    polls: int,
    dtype: torch.dtype,
    config: Config,
    flags: int = CHUNKS,
) -> int:
    """Launches kernel 1 where there is anything to multiply; returns the rows behind one flag."""
    (M, K), N, world_size = x.shape, w.shape[0], len(rows)
    flag_tiles = flag_tiles_of(max(rows), config.block_m, flags)
    tiles = sum(triton.cdiv(count, config.block_m) for count in rows) * triton.cdiv(N, config.block_n)
    if tiles:
        x_tma, w_tma = tma_of_x(x, config), tma_of_w(w, config)
        if x_tma or w_tma:
            let_descriptors_allocate(x.device)
        matmul_to_owners[(programs_of(config, tiles, x.device),)](
            x,
            w,
            x_scale,
            w_scale,
            starts_table(rows, x.device),
            torch.zeros(world_size * CHUNKS, dtype=torch.int32, device=x.device),
            pointers,
            rank,
            slot_bytes,
            polls,
            M,
            N,
            K,
            x.stride(0),
            w.stride(0),
            w.stride(1),
            max(rows),
            flag_tiles,
            tiles,
            WORLD=world_size,
            DTYPE=TYPES[dtype],
            SCALED=x_scale is not None,
            X_TMA=x_tma,
            W_TMA=w_tma,
            **tile_options(x, config),
        )
    return flag_tiles * config.block_m


def matmul_reduce_scatter(
    x: torch.Tensor,
    w: torch.Tensor,
    pointers: torch.Tensor,
    rank: int,
    world_size: int,
    slot_bytes: int,
    polls: int,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    splits: Sequence[int] | None = None,
    activation: str = "",
    x_scale: torch.Tensor | None = None,
    w_scale: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    config: Config | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """y [M_r, N] = activation(the sum over ranks of x @ w.T, rows of this rank, + bias + residual).

    x [M, K_r]; w [N, K_r], any strides; bias [N], residual [M_r, N]. float8_e4m3fn operands: x_scale and w_scale, one
    float32 each. Shares are rounded to the dtype of y, added in float32 in rank order, rounded once.
    pointers, slot_bytes: of a channel that this op alone uses. A wait ends after `polls` looks; then nothing more is
    written to y, and the channel's check() raises.
    """
    name = "matmul_reduce_scatter"
    check_operands(name, x, w, (x_scale, w_scale))
    dtype, config = result_type(x, out_dtype), config or config_on(x)
    (M, _), N = x.shape, w.shape[0]
    rows = rows_by_rank(M, world_size, splits)
    check_additions(name, (rows[rank], N), bias, residual, activation)
    check_bytes(name, matmul_reduce_scatter_bytes(M, N, world_size, dtype, splits), slot_bytes)
    x = with_rows_in_line(x)
    y = x.new_empty(rows[rank], N, dtype=dtype) if out is None else out
    flag_rows = multiply_for_owners(x, w, x_scale, w_scale, rows, pointers, rank, slot_bytes, polls, dtype, config)
    tiles = triton.cdiv(rows[rank], config.rows) * triton.cdiv(N, config.cols)
    reduce_own_rows[(programs_of(config, tiles, x.device),)](
        y,
        bias,
        residual,
        residual.stride(0) if residual is not None else 0,
        pointers,
        rank,
        slot_bytes,
        polls,
        rows[rank],
        N,
        max(rows),
        flag_rows,
        WORLD=world_size,
        CHUNKS=CHUNKS,
        DTYPE=TYPES[dtype],
        HAS_BIAS=bias is not None,
        HAS_RESIDUAL=residual is not None,
        ACTIVATION=activation,
        ROWS=config.rows,
        COLS=config.cols,
    )
    return y
