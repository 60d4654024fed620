"""The benches of the fused matmuls: against torch.distributed around the same matmul, and against the matmul alone.

A case is named by the bytes of the rows that travel: M x D float32, D = 512. Column-parallel: x [M, D], two weights of
[F/R, D]; row-parallel: x [M, F/R], w [D, F/R]; F = 1408. bench_<op>.py are doors to main() here.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from bench import harness, report
from bench.collectives import parse_sizes
from bench.harness import Case, size_name
from bench.pool import LIMIT_S, PoolVariant, Rank, RankPool

D, F = 512, 1408
SIZES = (128 << 10, 512 << 10, 2 << 20, 8 << 20)  # 64, 256, 1024, 4096 rows
VARIANTS = ("no communication", "gloo", "pypar dist", "pypar fused", "pypar fused symmetric")


class MatmulRank(Rank):
    """Holds x, the weights and the groups."""

    def __init__(self, rank: int, world: int, folder: str, page: str, max_bytes: int):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[rank % len(cores)]})
        super().__init__(rank, world, folder, page)
        from torch.distributed import _symmetric_memory as symmetric

        import pypar  # noqa: F401  (registers the backend)

        self.groups: dict[str, Any] = {"gloo": dist.group.WORLD}
        self.groups["pypar"] = dist.new_group(backend="pypar", timeout=timedelta(seconds=LIMIT_S))
        self.name = self.groups["pypar"].group_name
        rows, part = max_bytes // (4 * D), F // world
        generator = torch.Generator().manual_seed(1)

        def integers(*shape: int) -> torch.Tensor:
            return torch.randint(-1, 2, shape, generator=generator).float()

        self.full_x, self.full_h = integers(rows, D), integers(rows, part * world)
        self.up = [integers(part * world, D).chunk(world)[rank].clone() for _ in range(2)]
        whole_down = integers(D, part * world)
        self.down, self.whole_down = whole_down.chunk(world, 1)[rank].clone(), whole_down
        self.window = symmetric.empty(rows, D, dtype=torch.float32, device="cpu")
        symmetric.rendezvous(self.window, self.name)

    def prepare(self, variant: str, case: Case) -> tuple[Callable[[], Any], Callable[[], list[torch.Tensor]]]:
        """(the op, what it must give)."""
        rows = case.nbytes // (4 * D)
        mine = slice(self.rank * rows // self.world, (self.rank + 1) * rows // self.world)
        group = self.groups["gloo" if variant == "gloo" else "pypar"]
        if case.op == "all_gather_matmul":
            shard = self.full_x[mine].contiguous()
            if variant == "pypar fused symmetric":
                shard = self.window[: shard.shape[0]].copy_(shard)
            full = self.full_x[:rows]

            def gathered() -> list[torch.Tensor]:
                x = torch.empty(rows, D)
                dist.all_gather_single(x, shard, group=group)
                return [x @ w.t() for w in self.up]

            fused = lambda: torch.ops.pypar.all_gather_matmul(shard, self.up, [], None, self.name)  # noqa: E731
            alone = lambda: [full @ w.t() for w in self.up]  # noqa: E731
            return {"no communication": alone, "gloo": gathered, "pypar dist": gathered}.get(variant, fused), alone
        h = self.full_h[:rows].chunk(self.world, 1)[self.rank].contiguous()
        scatters = case.op == "matmul_reduce_scatter"

        def around() -> list[torch.Tensor]:
            y = h @ self.down.t()
            if not scatters:
                dist.all_reduce(y, group=group)
                return [y]
            out = torch.empty(rows // self.world, D)
            dist.reduce_scatter_single(out, y, group=group)
            return [out]

        def fused() -> list[torch.Tensor]:
            if scatters:
                return [torch.ops.pypar.matmul_reduce_scatter([h], [self.down], None, None, None, self.name)]
            return [torch.ops.pypar.matmul_all_reduce([h], [self.down], None, None, self.name)]

        def want() -> list[torch.Tensor]:
            if variant == "no communication":
                return [h @ self.down.t()]
            y = self.full_h[:rows] @ self.whole_down.t()
            return [y[mine] if scatters else y]

        alone = lambda: [h @ self.down.t()]  # noqa: E731
        return {"no communication": alone, "gloo": around, "pypar dist": around}.get(variant, fused), want

    def verify(self, variant: str, case: Case) -> str:
        run, want = self.prepare(variant, case)
        self.barrier()
        got, expected = run(), want()
        self.barrier()
        for y, e in zip(got, expected, strict=True):
            if not torch.equal(y, e):
                return f"rank {self.rank}: {case.op} is off by {(y - e).abs().max():g}"
        return ""

    def measure(self, variant: str, case: Case, iters: int, num_samples: int) -> list[float]:
        run, _ = self.prepare(variant, case)
        return self.timed(run, iters, num_samples)


class MatmulVariant(PoolVariant):
    def skips(self, case: Case) -> bool:
        return self.name == "pypar fused symmetric" and case.op != "all_gather_matmul"


def efficiency(results: Sequence[harness.Result]) -> list[report.Ratio]:
    times = report.medians(results)

    def of(variant: str) -> Callable[[int], float | None]:
        pairs = lambda s: (times.get(("no communication", s)), times.get((variant, s)))  # noqa: E731
        return lambda s: 100 * pairs(s)[0] / pairs(s)[1] if all(pairs(s)) else None

    return [report.Ratio(f"efficiency of {name}, %", of(name), lambda s: None) for name in VARIANTS[1:]]


def main(op: str, argv: Sequence[str] | None = None) -> int:
    """1 when a variant was refused, else 0."""
    p = argparse.ArgumentParser(description=f"Bench {op}; efficiency = time of the matmul alone / time")
    p.add_argument("--ranks", type=int, default=2, choices=range(2, 5), metavar="2..4")
    p.add_argument("--sizes", type=parse_sizes, default=SIZES, help="bytes of the rows that travel, as 128K,8M")
    p.add_argument("--rounds", type=int, default=5, help="of A B A B; default 5")
    args = p.parse_args(argv)
    cases = [Case(op, nbytes, args.ranks) for nbytes in args.sizes]
    pool = RankPool(args.ranks, MatmulRank, max(args.sizes))
    try:
        results = harness.run([MatmulVariant(name, pool) for name in VARIANTS], cases, args.rounds, say=print)
    finally:
        pool.close()
    csv_path = harness.write_csv(f"bench_{op}", results)
    kept = harness.one_regime(results)
    sizes = sorted({r.case.nbytes for r in kept})
    print(f"\n{op}, {args.ranks} ranks, one thread each, float32, sizes of the rows that travel\n{report.table(kept)}")
    print(f"\n{report.ratio_table(efficiency(kept), sizes)}")
    title = f"{op}, {args.ranks} ranks on one host, {', '.join(map(size_name, sizes))} of rows"
    print(f"\n{csv_path}\n{report.chart(f'bench_{op}', title, kept)}")
    return 1 if any(r.refused for r in results) else 0
