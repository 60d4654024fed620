"""One tile of x [M, K] @ w [N, K].T, in the order that L2 likes, and what the fused matmuls' launchers share.

TMA descriptors are for operands that earlier kernels of this rank wrote: to read through the async proxy what a peer
stores while the kernel runs takes a proxy fence, which Triton has no word for. Stores to peers are plain ones of 16
bytes, which the release of the flag covers.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

CHUNKS = 256  # flags of a source in a channel, as in pypar/channel.py

TYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
FP8 = torch.float8_e4m3fn


@triton.jit
def tile_at(index, tiles_m, tiles_n, GROUP_M: tl.constexpr):
    """(m, n) of tile `index`: column by column through GROUP_M rows of tiles, which then stay in L2."""
    of_group = GROUP_M * tiles_n
    first = index // of_group * GROUP_M
    height = tl.minimum(tiles_m - first, GROUP_M)
    within = index % of_group
    return first + within % height, within // height


@triton.jit
def weight_of(w, N, K, stride_n, stride_k, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, W_TMA: tl.constexpr):
    """What `product` reads w through. W_TMA: 0 pointers, 1 a descriptor of [N, K], 2 of [K, N], for a transposed w."""
    if W_TMA == 1:
        weight = tl.make_tensor_descriptor(w, [N, K], [stride_n, 1], [BLOCK_N, BLOCK_K])
    elif W_TMA == 2:
        weight = tl.make_tensor_descriptor(w, [K, N], [stride_k, 1], [BLOCK_K, BLOCK_N])
    else:
        weight = w
    return weight


@triton.jit
def product(
    x,
    weight,
    row,
    col,
    rows,
    N,
    K,
    stride_xm,
    stride_n,
    stride_k,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    X_TMA: tl.constexpr,
    W_TMA: tl.constexpr,
    IMPRECISE: tl.constexpr,
):
    """float32 [BLOCK_M, BLOCK_N] = x[row:, :] @ w[col:, :].T; zeros where x has no more than `rows` rows, w none.

    IMPRECISE: products that the tensor cores may add up in less than float32, which they do for fp8 alone.
    """
    ks = tl.arange(0, BLOCK_K)
    m = row + tl.arange(0, BLOCK_M)
    n = col + tl.arange(0, BLOCK_N)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, K, BLOCK_K):
        inside = ks < K - k
        if X_TMA:
            a = x.load([row, k])
        else:
            at = x + m.to(tl.int64)[:, None] * stride_xm + (k + ks)[None, :]
            a = tl.load(at, (m < rows)[:, None] & inside[None, :], other=0.0)
        if W_TMA == 1:
            b = weight.load([col, k]).T
        elif W_TMA == 2:
            b = weight.load([k, col])
        else:
            at = weight + (k + ks).to(tl.int64)[:, None] * stride_k + n.to(tl.int64)[None, :] * stride_n
            b = tl.load(at, inside[:, None] & (n < N)[None, :], other=0.0)
        total = tl.dot(a, b, total, input_precision="ieee", max_num_imprecise_acc=IMPRECISE)
    return total


@dataclasses.dataclass(frozen=True)
class Config:
    """How a matmul kernel is cut. tma: descriptors where the operands allow them, sm_90 and later.

    programs: of the persistent grid, 0 for one on each multiprocessor. rows, cols: tile of the kernels that only add.
    """

    block_m: int = 128
    block_n: int = 128
    block_k: int = 64
    group_m: int = 8
    num_warps: int = 8
    num_stages: int = 3
    tma: bool = False
    programs: int = 0
    rows: int = 16
    cols: int = 256

    def __post_init__(self) -> None:
        if self.block_m % self.rows:
            raise ValueError(f"rows {self.rows} of the adding kernels don't divide block_m {self.block_m}")


@functools.cache
def config_for(dtype: torch.dtype, capability: int) -> Config:
    """Tiles for a target: 80, 90 or 100. Chosen by what compiles without spills, not by time: no GPU was at hand."""
    if dtype == torch.float32:  # exact products run on the ordinary units, whose registers hold the tile
        return Config(block_m=64, block_n=64 if capability < 90 else 128, block_k=16)
    if capability < 90:
        return Config()
    if dtype == FP8 and capability < 100:  # a second accumulator in registers: see IMPRECISE of `product`
        return Config(block_k=128, tma=True)
    return Config(block_n=256, block_k=128 if dtype == FP8 else 64, tma=True)


def config_on(x: torch.Tensor) -> Config:
    if x.device.type != "cuda":
        return Config(block_m=32, block_n=32, block_k=32, programs=4, cols=64)
    major, _ = torch.cuda.get_device_capability(x.device)
    return config_for(x.dtype, major * 10)


def programs_of(config: Config, tiles: int, device: torch.device, spare: int = 0) -> int:
    """Of a persistent grid; `spare` multiprocessors stay free for blocks of a kernel that this one waits for."""
    most = config.programs
    if not most:
        on_gpu = device.type == "cuda"
        most = torch.cuda.get_device_properties(device).multi_processor_count - spare if on_gpu else 4
    return max(1, min(most, tiles))


def rows_by_rank(M: int, world_size: int, splits: Sequence[int] | None) -> tuple[int, ...]:
    """Rows of each rank: splits, or ceil(M / world_size), the last ranks fewer or none."""
    if splits is not None:
        if len(splits) != world_size or sum(splits) != M or min(splits) < 0:
            raise ValueError(f"splits {list(splits)} don't cut {M} rows for {world_size} ranks")
        return tuple(splits)
    each = -(-M // world_size)
    return tuple(max(0, min(each, M - r * each)) for r in range(world_size))


def flag_tiles_of(rows_max: int, block_m: int, most: int = CHUNKS) -> int:
    """Tiles of rows behind one flag: one, or what it takes for `most` flags to do."""
    return max(1, -(-rows_max // (block_m * most)))


@functools.lru_cache(maxsize=256)
def starts_table(rows: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """int32 [world_size + 1]: the first row of each rank, and the end. Kept: a captured graph copies nothing."""
    starts = [0]
    for count in rows:
        starts.append(starts[-1] + count)
    return torch.tensor(starts, dtype=torch.int32, device=device)


def check_operands(name: str, x: torch.Tensor, w: torch.Tensor, scales: Sequence[torch.Tensor | None]) -> None:
    if x.dim() != 2 or w.dim() != 2 or x.shape[1] != w.shape[1]:
        raise ValueError(f"{name}: x [M, K] and w [N, K] don't fit: {list(x.shape)}, {list(w.shape)}")
    if x.dtype != w.dtype or x.dtype not in (*TYPES, FP8):
        raise ValueError(f"{name} takes float32, float16, bfloat16 and float8_e4m3fn, got {x.dtype} and {w.dtype}")
    if any((scale is None) == (x.dtype == FP8) for scale in scales):
        raise ValueError(f"{name}: float8 operands come with a scale each, others without; x is {x.dtype}")


def check_bytes(name: str, needed: int, slot_bytes: int) -> None:
    if needed > slot_bytes:
        raise ValueError(f"{name}: the slots hold {slot_bytes} bytes, this call needs {needed}; take a larger channel")


def result_type(x: torch.Tensor, out_dtype: torch.dtype | None) -> torch.dtype:
    return out_dtype or (torch.bfloat16 if x.dtype == FP8 else x.dtype)


def with_rows_in_line(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(1) == 1 or x.shape[1] <= 1 else x.contiguous()


def tma_of_x(x: torch.Tensor, config: Config) -> bool:
    return config.tma and x.numel() > 0 and _aligned(x, x.stride(0)) and x.stride(1) == 1


def tma_of_w(w: torch.Tensor, config: Config) -> int:
    """As W_TMA of `weight_of`."""
    if not config.tma or not w.numel():
        return 0
    if w.stride(1) == 1 and _aligned(w, w.stride(0)):
        return 1
    return 2 if w.stride(0) == 1 and _aligned(w, w.stride(1)) else 0


def _aligned(t: torch.Tensor, stride: int) -> bool:
    return t.data_ptr() % 16 == 0 and stride > 0 and stride * t.element_size() % 16 == 0


def let_descriptors_allocate(device: torch.device) -> None:
    """Descriptors that a kernel makes live in memory that Triton asks for at launch."""
    if device.type == "cuda":
        triton.set_allocator(lambda size, align, stream: torch.empty(size, dtype=torch.int8, device=device))


def tile_options(x: torch.Tensor, config: Config) -> dict[str, Any]:
    return {
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "GROUP_M": config.group_m,
        "IMPRECISE": config.block_k if x.dtype == FP8 else 0,
        "CHUNKS": CHUNKS,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }
