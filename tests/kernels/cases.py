"""What every executor of an op must give: arguments of one rank, and what plain torch makes of those of all ranks.

Integer-valued data, so that any order of sums gives the same bits, unless a case says otherwise.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from pypar.reference.collectives import rows_per_rank

HALF = (torch.bfloat16, torch.float16)
GROUP = "the group's name"  # where it goes among the arguments
Case = tuple[list[Any], list[torch.Tensor]]  # arguments, results


def integers(shape: tuple[int, ...], dtype: torch.dtype, seed: int, most: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-most, most + 1, shape, generator=generator).to(dtype)


def of_ranks(shape: tuple[int, ...], dtype: torch.dtype, world: int, seed: int) -> list[torch.Tensor]:
    return [integers(shape, dtype, 1000 * seed + r) for r in range(world)]


def collective(op: str, numel: int, dtype: torch.dtype, rank: int, world: int, seed: int) -> Case:
    if op == "all_reduce":
        xs = of_ranks((numel,), dtype, world, seed)
        return [xs[rank], "sum", GROUP], [torch.stack(xs).double().sum(0).to(dtype)]
    if op == "reduce_scatter":
        xs = of_ranks((numel, 3), dtype, world, seed)
        total = torch.stack(xs).double().sum(0).to(dtype)
        return [xs[rank], "sum", GROUP], [total.split(rows_per_rank(numel, world, None))[rank]]
    rows = rows_per_rank(numel, world, None)  # all_gather of uneven parts
    xs = [integers((n, 3), dtype, 1000 * seed + r) for r, n in enumerate(rows)]
    return [xs[rank], GROUP, rows], [torch.cat(xs)]


def gather_matmul(rows: int, n: int, k: int, dtype: torch.dtype, rank: int, world: int, seed: int) -> Case:
    counts = rows_per_rank(rows, world, None)
    xs = [integers((count, k), dtype, 1000 * seed + r) for r, count in enumerate(counts)]
    weights = [integers((n + i, k), dtype, 7 + i + rank + seed) for i in range(2)]
    biases = [integers((n,), dtype, 5 + rank), None]
    full = torch.cat(xs).double()
    ys = [full @ w.double().t() + (0 if b is None else b.double()) for w, b in zip(weights, biases, strict=True)]
    return [xs[rank], weights, biases, counts, GROUP], [y.to(dtype) for y in ys]


def row_parallel(op: str, rows: int, n: int, k: int, dtype: torch.dtype, rank: int, world: int, seed: int) -> Case:
    xs = [integers((rows, k + r), dtype, 1000 * seed + r) for r in range(world)]  # uneven over K
    ws = [integers((n, k + r), dtype, 2000 * seed + r) for r in range(world)]
    shares = [(x.double() @ w.double().t()).to(dtype).double() for x, w in zip(xs, ws, strict=True)]
    bias = integers((n,), dtype, seed)
    if op == "matmul_all_reduce":
        residual = integers((rows, n), dtype, seed + 1)
        total = sum(shares) + bias.double() + residual.double()
        return [[xs[rank]], [ws[rank]], bias, residual, GROUP], [total.to(dtype)]
    counts = rows_per_rank(rows, world, None)
    mine = slice(sum(counts[:rank]), sum(counts[: rank + 1]))
    residual = integers((counts[rank], n), dtype, seed + 1 + rank)
    total = sum(share[mine] for share in shares) + bias.double() + residual.double()
    return [[xs[rank]], [ws[rank]], bias, residual, None, GROUP], [total.to(dtype)]


def shards(op: str, numel: int, dtype: torch.dtype, rank: int, world: int, seed: int) -> Case:
    sizes = rows_per_rank(numel, world, None)
    mine = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
    if op == "zero_gather":
        full = integers((numel,), dtype, seed)
        return [torch.empty_like(full), full[mine].clone(), sizes, GROUP], [full]
    fulls = of_ranks((numel,), dtype, world, seed)
    total = torch.stack(fulls).double().sum(0)[mine] / 2
    return [torch.empty(sizes[rank]), fulls[rank], sizes, 0.5, False, GROUP], [total.float()]


def step(numel: int, seed: int) -> Case:
    generator = torch.Generator().manual_seed(seed)
    param, grad, exp_avg = (torch.randn(numel, generator=generator) for _ in range(3))
    exp_avg_sq, most = torch.rand(numel, generator=generator), torch.rand(numel, generator=generator)
    given = [param, grad, exp_avg, exp_avg_sq, most, torch.empty(numel, dtype=torch.bfloat16)]
    settings = [3, 1e-2, 0.9, 0.99, 1e-8, 0.1, 0.5, True, False]
    from pypar.reference.zero_step import zero_step

    expected = [t.clone() for t in given]
    zero_step(*expected, *settings)
    return [*given, *settings], [expected[i] for i in (0, 2, 3, 4, 5)]


def loss(rows: int, dtype: torch.dtype, rank: int, world: int, seed: int) -> Case:
    sizes = [5 + r for r in range(world)]
    shards = [integers((rows, n), dtype, 1000 * seed + r) for r, n in enumerate(sizes)]
    target = integers((rows,), torch.int64, seed, sum(sizes) - 1).abs()
    target[::5] = -100
    full, kept = torch.cat(shards, 1).double(), target != -100
    most = torch.where(kept, full.amax(1), 0)
    total = torch.where(kept, torch.exp(full - full.amax(1, keepdim=True)).sum(1), 1)
    sums = torch.nn.functional.cross_entropy(full, target, reduction="sum", label_smoothing=0.1)
    expected = [sums, kept.sum(), torch.stack([most, total])]
    return [shards[rank], target, sizes, -100, 0.1, GROUP], [t.float() for t in expected]


def linear_loss(rows: int, dtype: torch.dtype, rank: int, world: int, seed: int) -> Case:
    """In chunks of 50 rows. The logits are exact; their gradient and each rank's share of dhidden are rounded."""
    sizes, K = [5 + r for r in range(world)], 3
    hidden = integers((rows, K), dtype, seed, 1)
    weights = [integers((n, K), dtype, 1000 * seed + r, 1) for r, n in enumerate(sizes)]
    target = integers((rows,), torch.int64, seed, sum(sizes) - 1).abs()
    target[::5] = -100
    logits = (hidden.double() @ torch.cat(weights).double().t()).requires_grad_()
    total = torch.nn.functional.cross_entropy(logits, target, reduction="sum", label_smoothing=0.1)
    (dlogits,) = torch.autograd.grad(total, logits)
    parts = dlogits.to(dtype).double().split(sizes, 1)
    shares = [(part @ w.double()).to(dtype).double() for part, w in zip(parts, weights, strict=True)]
    dweight = parts[rank].t() @ hidden.double()
    kept = (target != -100).sum()
    arguments = [hidden, weights[rank], target, sizes, -100, 0.1, 50, True, True, GROUP]
    return arguments, [total.detach().float(), kept.float(), sum(shares).to(dtype), dweight.float()]


def results_of(op: str, returned: Any, arguments: list[Any]) -> list[torch.Tensor]:
    """What the op made, in place or not."""
    if op == "zero_step":
        return [arguments[i] for i in (0, 2, 3, 4, 5)]
    if op in ("zero_gather", "zero_scatter"):
        return [arguments[0]]
    return list(returned) if isinstance(returned, (list, tuple)) else [returned]


CASES: dict[str, Callable[..., Case]] = {
    **{
        op: lambda size, dtype, rank, world, seed, op=op: collective(op, size, dtype, rank, world, seed)
        for op in ("all_reduce", "reduce_scatter", "all_gather")
    },
    "all_gather_matmul": lambda size, dtype, rank, world, seed: gather_matmul(size, 5, 17, dtype, rank, world, seed),
    **{
        op: lambda size, dtype, rank, world, seed, op=op: row_parallel(op, size, 19, 5, dtype, rank, world, seed)
        for op in ("matmul_reduce_scatter", "matmul_all_reduce")
    },
    **{
        op: lambda size, dtype, rank, world, seed, op=op: shards(op, size, dtype, rank, world, seed)
        for op in ("zero_gather", "zero_scatter")
    },
    "vocab_cross_entropy": lambda size, dtype, rank, world, seed: loss(size, dtype, rank, world, seed),
    "linear_vocab_cross_entropy": lambda size, dtype, rank, world, seed: linear_loss(size, dtype, rank, world, seed),
    "zero_step": lambda size, dtype, rank, world, seed: step(size, seed),
}
