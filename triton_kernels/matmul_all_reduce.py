"""y = the sum over ranks of x_r @ w_r.T, on every rank: small results in one step, others by way of the rows' owners.

One step: kernel 1 stores every tile into every rank's slot [world_size][M][N], kernel 2 adds. Two steps: kernel 1 as in
matmul_reduce_scatter, kernel 2 adds the own rows and stores them into every rank's slot, behind the parts; kernel 3
copies them out of it. Compiled and executed under emulation; not yet run on a GPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .matmul_parts import arrive, check_additions, part_of, scaled, sum_of_parts, wait_for_parts
from .matmul_reduce_scatter import multiply_for_owners, reduce_own_rows
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
from .signal import finish, full_flag, publish, slot_of, this_call, wait, wait_empty, words_of

ONE_STEP_BYTES = 256 * 1024  # results up to here travel whole
HALF: tl.constexpr = tl.constexpr(128)  # flags 0..127 of a source are for its shares, 128..255 for its sums


@triton.jit
def matmul_to_all(
    x,
    w,
    x_scale,
    w_scale,
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
    flag_tiles,
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
    """Every tile into every rank's slot; a flag stands for `flag_tiles` tiles of rows."""
    call = this_call(words_of(pointers, rank))
    free = wait_empty(pointers, rank, call, polls, WORLD, CHUNKS)
    xs = tl.make_tensor_descriptor(x, [M, K], [stride_xm, 1], [BLOCK_M, BLOCK_K]) if X_TMA else x
    ws = weight_of(w, N, K, stride_n, stride_k, BLOCK_N, BLOCK_K, W_TMA)
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(N, BLOCK_N)
    for tile in range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0)):
        tile_m, tile_n = tile_at(tile, tiles_m, tiles_n, GROUP_M)
        total = product(
            xs,
            ws,
            tile_m * BLOCK_M,
            tile_n * BLOCK_N,
            M,
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
        value = scaled(total, x_scale, w_scale, SCALED).to(DTYPE)
        m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
        n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
        mask = (m < M)[:, None] & (n < N)[None, :] & free
        for step in range(WORLD):
            there = words_of(pointers, (rank + 1 + step) % WORLD)
            part = part_of(there, rank, M, N, call, slot_bytes, DTYPE, WORLD, CHUNKS)
            tl.store(part + m.to(tl.int64)[:, None] * N + n[None, :], value, mask)
        block = tile_m // flag_tiles
        expected = tl.minimum(tiles_m - block * flag_tiles, flag_tiles) * tiles_n
        if arrive(counters + block, expected, free):
            for step in range(WORLD):
                there = words_of(pointers, (rank + 1 + step) % WORLD)
                publish(full_flag(there, rank, block, call, WORLD, CHUNKS), call)


@triton.jit
def result_of(words, call, slot_bytes, offset, DTYPE: tl.constexpr, WORLD: tl.constexpr, CHUNKS: tl.constexpr):
    """[M, N] behind the parts of a slot, `offset` bytes from its start."""
    at = slot_of(words, call, slot_bytes, WORLD, CHUNKS) + offset
    return tl.multiple_of(at.to(tl.pointer_type(DTYPE)), 16)


@triton.jit
def reduce_to_all(
    bias,
    residual,
    stride_residual,
    starts,
    counters,
    pointers,
    rank,
    slot_bytes,
    polls,
    N,
    rows_max,
    offset,
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
    """The own rows of the sum, into every rank's slot. residual: all rows."""
    words = words_of(pointers, rank)
    call = this_call(words)
    first = tl.load(starts + rank)
    count = tl.load(starts + rank + 1) - first
    strips = tl.cdiv(count, ROWS)
    strips_of_flag = flag_rows // ROWS
    tiles_n = tl.cdiv(N, COLS)
    seen = -1
    there = True
    for tile in range(tl.program_id(0), strips * tiles_n, tl.num_programs(0)):
        strip = tile // tiles_n
        block = strip // strips_of_flag
        if block != seen:
            seen = block
            there = there & wait_for_parts(words, block, call, pointers, rank, polls, WORLD, CHUNKS)
        m = strip * ROWS + tl.arange(0, ROWS)
        n = tile % tiles_n * COLS + tl.arange(0, COLS)
        mask = (m < count)[:, None] & (n < N)[None, :] & there
        value = sum_of_parts(
            words,
            m,
            n,
            mask,
            bias,
            residual + tl.cast(first, tl.int64) * stride_residual if HAS_RESIDUAL else residual,
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
        at = (first + m).to(tl.int64)[:, None] * N + n[None, :]
        for step in range(WORLD):
            peer = words_of(pointers, (rank + 1 + step) % WORLD)
            tl.store(result_of(peer, call, slot_bytes, offset, DTYPE, WORLD, CHUNKS) + at, value, mask)
        expected = tl.minimum(strips - block * strips_of_flag, strips_of_flag) * tiles_n
        if arrive(counters + block, expected, there):
            for step in range(WORLD):
                peer = words_of(pointers, (rank + 1 + step) % WORLD)
                publish(full_flag(peer, rank, block + HALF, call, WORLD, CHUNKS), call)


@triton.jit
def copy_result(
    y,
    starts,
    pointers,
    rank,
    slot_bytes,
    polls,
    N,
    offset,
    flag_rows,
    WORLD: tl.constexpr,
    CHUNKS: tl.constexpr,
    DTYPE: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """y [M, N], the own rows first. Its waits pair with the publish of reduce_to_all."""
    words = words_of(pointers, rank)
    call = this_call(words)
    result = result_of(words, call, slot_bytes, offset, DTYPE, WORLD, CHUNKS)
    tiles_n = tl.cdiv(N, COLS)
    programs = tl.num_programs(0)
    before = 0
    there = True
    for step in range(WORLD):
        owner = (rank + step) % WORLD
        first = tl.load(starts + owner)
        count = tl.load(starts + owner + 1) - first
        tiles = tl.cdiv(count, ROWS) * tiles_n
        seen = -1
        for tile in range((tl.program_id(0) + programs - before % programs) % programs, tiles, programs):
            row = tile // tiles_n * ROWS
            block = row // flag_rows
            if block != seen:
                seen = block
                flag = full_flag(words, owner, block + HALF, call, WORLD, CHUNKS)
                there = there & wait(flag, call, pointers, rank, 1, owner, block + HALF, polls, WORLD)
            m = row + tl.arange(0, ROWS)
            n = tile % tiles_n * COLS + tl.arange(0, COLS)
            mask = (m < count)[:, None] & (n < N)[None, :] & there
            at = (first + m).to(tl.int64)[:, None] * N + n[None, :]
            tl.store(y + at, tl.load(result + at, mask), mask)
        before += tiles
    finish(pointers, rank, call, programs, WORLD, CHUNKS)


def in_one_step(M: int, N: int, dtype: torch.dtype) -> bool:
    return M * N * dtype.itemsize <= ONE_STEP_BYTES


def result_offset(M: int, N: int, world_size: int, dtype: torch.dtype) -> int:
    """Bytes of a slot before the result, in two steps."""
    parts = world_size * max(rows_by_rank(M, world_size, None)) * N * dtype.itemsize
    return -(-parts // 256) * 256


def matmul_all_reduce_bytes(M: int, N: int, world_size: int, dtype: torch.dtype) -> int:
    """Of a slot that such a call needs; dtype: of the result."""
    whole = M * N * dtype.itemsize
    return world_size * whole if in_one_step(M, N, dtype) else result_offset(M, N, world_size, dtype) + whole


def matmul_all_reduce(
    x: torch.Tensor,
    w: torch.Tensor,
    pointers: torch.Tensor,
    rank: int,
    world_size: int,
    slot_bytes: int,
    polls: int,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    activation: str = "",
    x_scale: torch.Tensor | None = None,
    w_scale: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    config: Config | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """y [M, N] = activation(the sum over ranks of x @ w.T, + bias + residual), the same bits on every rank.

    x [M, K_r]; w [N, K_r], any strides; bias [N], residual [M, N]. The rest as in matmul_reduce_scatter.
    """
    name = "matmul_all_reduce"
    check_operands(name, x, w, (x_scale, w_scale))
    dtype, config = result_type(x, out_dtype), config or config_on(x)
    M, N = x.shape[0], w.shape[0]
    check_additions(name, (M, N), bias, residual, activation)
    check_bytes(name, matmul_all_reduce_bytes(M, N, world_size, dtype), slot_bytes)
    x = with_rows_in_line(x)
    y = x.new_empty(M, N, dtype=dtype) if out is None else out
    stride_residual = residual.stride(0) if residual is not None else 0
    tiles = triton.cdiv(M, config.rows) * triton.cdiv(N, config.cols)
    added = {"HAS_BIAS": bias is not None, "HAS_RESIDUAL": residual is not None, "ACTIVATION": activation}
    form = {"WORLD": world_size, "CHUNKS": CHUNKS, "DTYPE": TYPES[dtype], "ROWS": config.rows, "COLS": config.cols}
    if in_one_step(M, N, dtype):
        flag_rows = multiply_for_all(
            x, w, x_scale, w_scale, pointers, rank, world_size, slot_bytes, polls, dtype, config
        )
        reduce_own_rows[(programs_of(config, tiles, x.device),)](
            y, bias, residual, stride_residual, pointers, rank, slot_bytes, polls, M, N, M, flag_rows, **added, **form
        )  # fmt: skip
        return y
    rows = rows_by_rank(M, world_size, None)
    starts = starts_table(rows, x.device)
    offset = result_offset(M, N, world_size, dtype)
    flag_rows = multiply_for_owners(
        x, w, x_scale, w_scale, rows, pointers, rank, slot_bytes, polls, dtype, config, HALF.value
    )
    counters = torch.zeros(CHUNKS, dtype=torch.int32, device=x.device)
    own = triton.cdiv(rows[rank], config.rows) * triton.cdiv(N, config.cols)
    reduce_to_all[(programs_of(config, own, x.device),)](
        bias, residual, stride_residual, starts, counters, pointers, rank, slot_bytes, polls, N, max(rows), offset,
        flag_rows, **added, **form,
    )  # fmt: skip
    copy_result[(programs_of(config, tiles, x.device),)](
        y, starts, pointers, rank, slot_bytes, polls, N, offset, flag_rows, **form
    )
    return y


def multiply_for_all(
    x: torch.Tensor,
    w: torch.Tensor,
    x_scale: torch.Tensor | None,
    w_scale: torch.Tensor | None,
    pointers: torch.Tensor,
    rank: int,
    world_size: int,
    slot_bytes: int,
    polls: int,
    dtype: torch.dtype,
    config: Config,
) -> int:
    """Launches kernel 1 of one step where there is anything to multiply; returns the rows behind one flag."""
    (M, K), N = x.shape, w.shape[0]
    flag_tiles = flag_tiles_of(M, config.block_m)
    tiles = triton.cdiv(M, config.block_m) * triton.cdiv(N, config.block_n)
    if tiles:
        x_tma, w_tma = tma_of_x(x, config), tma_of_w(w, config)
        if x_tma or w_tma:
            let_descriptors_allocate(x.device)
        counters = torch.zeros(CHUNKS, dtype=torch.int32, device=x.device)
        matmul_to_all[(programs_of(config, tiles, x.device),)](
            x, w, x_scale, w_scale, counters, pointers, rank, slot_bytes, polls, M, N, K, x.stride(0), w.stride(0),
            w.stride(1), flag_tiles, WORLD=world_size, DTYPE=TYPES[dtype], SCALED=x_scale is not None, X_TMA=x_tma,
            W_TMA=w_tma, **tile_options(x, config),
        )  # fmt: skip
    return flag_tiles * config.block_m
