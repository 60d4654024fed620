"""fixed_matmul against torch.mm, one process, one thread: python -m bench.bench_fixed_matmul

A case is named by the bytes of the weight, [N, N] float32; x is [256, N]. "fixed, 8 shards" is what one rank alone does
with determinism "layout": 8 sums, added along a tree.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist

from bench import harness, report
from bench.collectives import parse_sizes
from bench.harness import Case

M = 256
SIZES = (1 << 20, 4 << 20, 16 << 20)


class Product:
    """A way to multiply, on data of whole numbers that every order sums to the same bits."""

    def __init__(self, name: str, fn: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]):
        self.name, self.fn = name, fn

    def skips(self, case: Case) -> bool:
        return False

    def operands(self, case: Case) -> list[torch.Tensor]:
        n = math.isqrt(case.nbytes // 4)
        generator = torch.Generator().manual_seed(1)
        return [torch.randint(-1, 2, shape, generator=generator).float() for shape in ((M, n), (n, n))]

    def verify(self, case: Case) -> str:
        x, w = self.operands(case)
        return "" if torch.equal(self.fn(x, w), x @ w.t()) else "the product is not exact"

    def measure(self, case: Case, iters: int, num_samples: int) -> list[float]:
        x, w = self.operands(case)
        us = []
        for _ in range(num_samples):
            start = time.perf_counter_ns()
            for _ in range(iters):
                self.fn(x, w)
            us.append((time.perf_counter_ns() - start) / (1000 * iters))
        return us


def main(argv: Sequence[str] | None = None) -> int:
    """1 when a variant was refused, else 0."""
    import pypar

    p = argparse.ArgumentParser(description="Bench the matmul of determinism 'layout' on one thread")
    p.add_argument("--sizes", type=parse_sizes, default=SIZES, help="bytes of the weight, as 1M,16M")
    p.add_argument("--rounds", type=int, default=5, help="of A B A B; default 5")
    args = p.parse_args(argv)
    torch.set_num_threads(1)
    pypar.init()
    name = dist.group.WORLD.group_name  # type: ignore[union-attr]
    variants = [
        Product("torch.mm", lambda x, w: x @ w.t()),
        Product("fixed", pypar.ops.fixed_matmul),
        Product(
            "fixed, 8 shards",
            lambda x, w: torch.ops.pypar.matmul_all_reduce([x], [w], None, None, name, "layout"),
        ),
    ]
    try:
        results = harness.run(variants, [Case("fixed_matmul", n, 1) for n in args.sizes], args.rounds, say=print)
    finally:
        dist.destroy_process_group()
    harness.write_csv("bench_fixed_matmul", results)
    kept = harness.one_regime(results)
    title = f"fixed_matmul, one thread, float32, x [{M}, N], sizes of the weight [N, N]"
    print(f"\n{title}\n{report.table(kept)}\n{report.chart('bench_fixed_matmul', title, kept)}\n")
    return 1 if any(r.refused for r in results) else 0


if __name__ == "__main__":
    sys.exit(main())
