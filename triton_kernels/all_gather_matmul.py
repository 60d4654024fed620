"""y_i = (x of all ranks, one below the other) @ w_i.T + b_i, beside the gather of x.

    open_call            waits until the slots are free and writes down the number of the call
    push_shard           stores the own shard into the peers' slots [world_size][rows_max][K], a flag behind each; or
    push_by_copies       has the copy engine store it, and tell_pushed raises the flags
    gathered_matmul      persistent: the tiles of the own shard, read in place, then those of rank + 1, ...

Whoever needs a shard first gets it first: rank - 1, then rank - 2, ... The pushes run beside the matmul, on a stream of
their own. A matmul that held every multiprocessor while push_shard waits for one would wait for peers in the same
position, for good: it leaves PUSH_PROGRAMS of them free, one for tell_pushed. Compiled and executed under
emulation; not yet run on a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from .copy_engine import beside, push_by_copies
from .matmul_parts import arrive, scaled
from .matmul_tile import (
    CHUNKS,
    FP8,
    TYPES,
    Config,
    check_bytes,
    check_operands,
    config_on,
    let_descriptors_allocate,
    product,
    programs_of,
    result_type,
    starts_table,
    tile_at,
    tile_options,
    tma_of_w,
    weight_of,
)
from .signal import finish, full_flag, publish, slot_of, this_call, wait, wait_empty, words_of

PUSH_BLOCK = 8192  # elements that a program of push_shard moves at a time
PUSH_PROGRAMS = 16


@triton.jit
def open_call(opened, pointers, rank, polls, WORLD: tl.constexpr, CHUNKS: tl.constexpr):
    """opened[0]: the number of the call, opened[1]: whether the slots are free. The pushes go by it and not by the
    epoch, since the matmul may end the call before this rank's last push begins."""
    call = this_call(words_of(pointers, rank))
    free = wait_empty(pointers, rank, call, polls, WORLD, CHUNKS)
    tl.store(opened, call)
    tl.store(opened + 1, tl.where(free, 1, 0))


@triton.jit
def push_shard(
    x,
    opened,
    counters,
    pointers,
    rank,
    slot_bytes,
    numel,
    stride_shard,
    WORLD: tl.constexpr,
    CHUNKS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """x [numel] to place `rank` of every peer's slot, whose shards are stride_shard apart; full[rank][0] behind it."""
    call = tl.load(opened)
    free = tl.load(opened + 1) != 0
    pieces = tl.cdiv(numel, BLOCK)
    for piece in range(tl.program_id(0), pieces * (WORLD - 1), tl.num_programs(0)):
        step = piece // pieces + 1
        peer = (rank + WORLD - step) % WORLD
        there = words_of(pointers, peer)
        slot = slot_of(there, call, slot_bytes, WORLD, CHUNKS).to(tl.pointer_type(x.dtype.element_ty))
        slot = tl.multiple_of(slot, 16) + tl.cast(rank, tl.int64) * stride_shard
        at = tl.cast(piece % pieces, tl.int64) * BLOCK + tl.arange(0, BLOCK)
        mask = at < tl.where(free, numel, 0)
        tl.store(slot + at, tl.load(x + at, mask), mask)
        if arrive(counters + peer, pieces, free):
            publish(full_flag(there, rank, 0, call, WORLD, CHUNKS), call)


@triton.jit
def tell_pushed(opened, pointers, rank, WORLD: tl.constexpr, CHUNKS: tl.constexpr):
    """Program p tells rank - 1 - p that the copies in front of this kernel are there: full[rank][0]."""
    call = tl.load(opened)
    if tl.load(opened + 1) != 0:
        there = words_of(pointers, (rank + WORLD - 1 - tl.program_id(0)) % WORLD)
        publish(full_flag(there, rank, 0, call, WORLD, CHUNKS), call)


@triton.jit
def gathered_matmul(
    x,
    weights,
    biases,
    ys,
    x_scale,
    w_scales,
    starts,
    pointers,
    rank,
    slot_bytes,
    polls,
    Ns,
    K,
    strides_n,
    strides_k,
    stride_shard,
    WORLD: tl.constexpr,
    CHUNKS: tl.constexpr,
    NUM: tl.constexpr,
    DTYPE: tl.constexpr,
    SCALED: tl.constexpr,
    BIASED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    IMPRECISE: tl.constexpr,
    W_TMA: tl.constexpr,
):
    """ys[i] [M, Ns[i]]. Shard by shard, in each all weights; program 0 waits for every shard, so that none is still
    under way when the call ends. Its waits pair with the publish of push_shard or of tell_pushed."""
    words = words_of(pointers, rank)
    call = this_call(words)
    slot = slot_of(words, call, slot_bytes, WORLD, CHUNKS).to(tl.pointer_type(x.dtype.element_ty))
    slot = tl.multiple_of(slot, 16)
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    before = 0
    there = True
    for step in range(WORLD):
        source = (rank + step) % WORLD
        first = tl.load(starts + source)
        count = tl.load(starts + source + 1) - first
        tiles_m = tl.cdiv(count, BLOCK_M)
        shard = tl.where(step == 0, x, slot + tl.cast(source, tl.int64) * stride_shard)
        has = 0
        for i in tl.static_range(NUM):
            has += tiles_m * tl.cdiv(Ns[i], BLOCK_N)
        mine = (program + programs - before % programs) % programs < has
        if (step > 0) & (count > 0) & (K > 0) & (mine | (program == 0)):
            flag = full_flag(words, source, 0, call, WORLD, CHUNKS)
            there = there & wait(flag, call, pointers, rank, 1, source, 0, polls, WORLD)
        for i in tl.static_range(NUM):
            N = Ns[i]
            ws = weight_of(weights[i], N, K, strides_n[i], strides_k[i], BLOCK_N, BLOCK_K, W_TMA)
            tiles = tiles_m * tl.cdiv(N, BLOCK_N)
            for tile in range((program + programs - before % programs) % programs, tiles, programs):
                tile_m, tile_n = tile_at(tile, tiles_m, tl.cdiv(N, BLOCK_N), GROUP_M)
                total = product(
                    shard,
                    ws,
                    tile_m * BLOCK_M,
                    tile_n * BLOCK_N,
                    tl.where(there, count, 0),
                    N,
                    K,
                    K,
                    strides_n[i],
                    strides_k[i],
                    BLOCK_M,
                    BLOCK_N,
                    BLOCK_K,
                    False,
                    W_TMA,
                    IMPRECISE,
                )
                if SCALED:
                    total = scaled(total, x_scale, w_scales[i], SCALED)
                m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
                n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
                if BIASED[i]:
                    total += tl.load(biases[i] + n, n < N, other=0.0).to(tl.float32)[None, :]
                at = (first + m).to(tl.int64)[:, None] * N + n[None, :]
                tl.store(ys[i] + at, total.to(DTYPE), (m < count)[:, None] & (n < N)[None, :] & there)
            before += tiles
    finish(pointers, rank, call, programs, WORLD, CHUNKS)


def _push_by_kernel(
    x: torch.Tensor,
    opened: torch.Tensor,
    pointers: torch.Tensor,
    rank: int,
    world_size: int,
    slot_bytes: int,
    stride_shard: int,
) -> None:
    pieces = triton.cdiv(x.numel(), PUSH_BLOCK)
    if pieces:
        counters = torch.zeros(world_size, dtype=torch.int32, device=x.device)
        push_shard[(min(PUSH_PROGRAMS, pieces),)](
            x, opened, counters, pointers, rank, slot_bytes, x.numel(), stride_shard, WORLD=world_size, CHUNKS=CHUNKS,
            BLOCK=PUSH_BLOCK,
        )  # fmt: skip


def all_gather_matmul_bytes(rows_max: int, K: int, world_size: int, dtype: torch.dtype) -> int:
    """Of a slot that such a call needs; rows_max: of the largest shard, dtype: of x."""
    return world_size * rows_max * K * dtype.itemsize


def all_gather_matmul(
    x: torch.Tensor,
    weights: Sequence[torch.Tensor],
    pointers: torch.Tensor,
    rank: int,
    world_size: int,
    slot_bytes: int,
    polls: int,
    biases: Sequence[torch.Tensor | None] | None = None,
    splits: Sequence[int] | None = None,
    x_scale: torch.Tensor | None = None,
    w_scales: Sequence[torch.Tensor] | None = None,
    out_dtype: torch.dtype | None = None,
    config: Config | None = None,
    addresses: Sequence[int] | None = None,
    call: int | None = None,
    outs: Sequence[torch.Tensor] | None = None,
) -> list[torch.Tensor]:
    """y_i [M, N_i] = (x of all ranks) @ w_i.T + b_i, in float32, rounded once.

    x [M_r, K], M_r = splits[rank], the same on all ranks without splits; w_i [N_i, K], any strides; b_i [N_i].
    pointers, slot_bytes, polls, float8: as in matmul_reduce_scatter.
    addresses: what `pointers` holds, on the host: the copy engine pushes, else a kernel does. On a GPU `call` comes
    with it, the number of this call on the channel, which says where in the peers' memory the copies go. A graph would
    replay that, so capture the kernel's form.
    """
    name = "all_gather_matmul"
    if not weights:
        raise ValueError(f"{name}: no weights")
    for i, w in enumerate(weights):
        check_operands(name, x, w, (x_scale, w_scales[i] if w_scales is not None else None))
    rows = tuple(splits) if splits is not None else (x.shape[0],) * world_size
    if len(rows) != world_size or rows[rank] != x.shape[0]:
        raise ValueError(f"{name}: rank {rank} of {world_size} has {x.shape[0]} rows, splits says {list(rows)}")
    for w, b in zip(weights, biases or (), strict=biases is not None and len(biases) > 0):
        if b is not None and (b.shape != w.shape[:1] or not b.is_contiguous()):
            raise ValueError(f"{name}: bias is {list(b.shape)}, expected [{w.shape[0]}] without gaps")
    K = x.shape[1]
    check_bytes(name, all_gather_matmul_bytes(max(rows), K, world_size, x.dtype), slot_bytes)
    dtype, config, x = result_type(x, out_dtype), config or config_on(x), x.contiguous()
    ys = list(outs) if outs is not None else [x.new_empty(sum(rows), w.shape[0], dtype=dtype) for w in weights]
    opened = torch.zeros(2, dtype=torch.int32, device=x.device)
    open_call[(1,)](opened, pointers, rank, polls, WORLD=world_size, CHUNKS=CHUNKS)

    def push() -> None:
        if addresses is None:
            _push_by_kernel(x, opened, pointers, rank, world_size, slot_bytes, max(rows) * K)
        else:
            push_by_copies(x, opened, addresses, rank, slot_bytes, max(rows) * K, call, CHUNKS)
            tell_pushed[(world_size - 1,)](opened, pointers, rank, WORLD=world_size, CHUNKS=CHUNKS)

    join = beside(push, x.device) if world_size > 1 and x.numel() else lambda: None
    tiles = sum(triton.cdiv(r, config.block_m) for r in rows) * sum(
        triton.cdiv(w.shape[0], config.block_n) for w in weights
    )
    kinds = {tma_of_w(w, config) for w in weights}
    w_tma = kinds.pop() if len(kinds) == 1 else 0
    if w_tma:
        let_descriptors_allocate(x.device)
    given = tuple(biases) if biases else (None,) * len(weights)
    spare = 0 if world_size == 1 else PUSH_PROGRAMS if addresses is None else 1
    gathered_matmul[(programs_of(config, tiles, x.device, spare),)](
        x,
        tuple(weights),
        given,
        tuple(ys),
        x_scale,
        tuple(w_scales) if w_scales is not None else None,
        starts_table(rows, x.device),
        pointers,
        rank,
        slot_bytes,
        polls,
        tuple(w.shape[0] for w in weights),
        K,
        tuple(w.stride(0) for w in weights),
        tuple(w.stride(1) for w in weights),
        max(rows) * K,
        WORLD=world_size,
        NUM=len(weights),
        DTYPE=TYPES[dtype],
        SCALED=x.dtype == FP8,
        BIASED=tuple(b is not None for b in given),
        W_TMA=w_tma,
        **tile_options(x, config),
    )
    join()
    return ys
