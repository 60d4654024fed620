"""The benches of ZeRO's ops: gradients to shards, and a whole step from gradients to published parameters.

A case is named by the bytes of the full gradients, float32. zero_scatter: against all_reduce over gloo and
reduce_scatter through torch.distributed. zero_gather: against all_gather over gloo and through torch.distributed, into
symmetric memory. zero_step: reduce, clip by the norm over all ranks, AdamW on the own shard, parameters to everybody;
torch's fused AdamW between gloo's collectives, the same over pypar, and pypar's ops on parameters that exist once. "one
rank's share" is the compute alone. "bytes of zero_step": as many bytes as it must move, moved by scaling a tensor in
place, half of them read and half written. bench_<op>.py are doors to main() here.
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
from bench.harness import Case, Result
from bench.pool import LIMIT_S, PoolVariant, Rank, RankPool

SIZES = (1 << 20, 16 << 20, 128 << 20)
SHARE, BYTES = "one rank's share", "bytes of zero_step"
GLOO = ("gloo all_reduce", "gloo reduce_scatter")
VARIANTS = (SHARE, *GLOO, "pypar dist", "pypar")
SETTINGS = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
MAX_NORM = 1.0
# float32 numbers of a shard's size that a step moves, without the ranks' gradients: the shard of the mean is written;
# then it is read, weights and both moments are read and written.
NUMBERS_MOVED = 1 + 7
IN_MEMORY_BYTES = 64 << 20  # above, caches don't hold it, and the bytes tell what a step must take


class ZeroRank(Rank):
    """Holds the gradients; what else a variant needs is made anew for every measurement."""

    def __init__(self, rank: int, world: int, folder: str, page: str, max_bytes: int):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[rank % len(cores)]})
        super().__init__(rank, world, folder, page)
        import pypar
        from pypar import symmetric

        self.ops, self.symmetric = pypar.ops, symmetric
        self.groups: dict[str, Any] = {"gloo": dist.group.WORLD}
        self.groups["pypar"] = dist.new_group(backend="pypar", timeout=timedelta(seconds=LIMIT_S))
        self.window = symmetric.empty(self.numel(max_bytes), torch.float32, self.groups["pypar"])

    def numel(self, nbytes: int) -> int:
        """Whole pages for every rank."""
        return max(1, nbytes // 4 // (1024 * self.world)) * 1024 * self.world

    def gradients(self, rank: int, n: int) -> torch.Tensor:
        return torch.randn(n, generator=torch.Generator().manual_seed(rank))

    def prepare(self, variant: str, case: Case) -> tuple[Callable[[], Any], Callable[[], torch.Tensor]]:
        """(what is timed, the result that is checked)"""
        n = self.numel(case.nbytes)
        part = n // self.world
        if variant == BYTES:
            moved = torch.ones((NUMBERS_MOVED + self.world) * part // 2)
            return lambda: moved.mul_(1.0), lambda: moved
        mine = slice(self.rank * part, (self.rank + 1) * part)
        group = self.groups["gloo" if variant in GLOO else "pypar"]
        full, shard = self.gradients(self.rank, n), torch.empty(part)
        if variant == "pypar":
            full = self.window[:n].copy_(full)

        def scatter() -> Any:
            if variant == SHARE:
                return torch.mul(full[mine], 1.0, out=shard)
            if variant == "pypar":
                return self.ops.zero_scatter(shard, full, [part] * self.world, group, scale=1 / self.world)
            if variant == "gloo all_reduce":
                work = full.clone()
                dist.all_reduce(work, group=group)
                return torch.div(work[mine], self.world, out=shard)
            if variant == "gloo reduce_scatter":
                dist.reduce_scatter_single(shard, full, group=group)
                return shard.div_(self.world)
            return dist.reduce_scatter_single(shard, full, dist.ReduceOp.AVG, group)

        if case.op == "zero_scatter":
            return scatter, lambda: shard
        if case.op == "zero_gather":
            own = self.gradients(self.rank, n)[mine].clone()
            whole = full.zero_()

            def gather() -> None:
                if variant == "one rank's share":
                    whole[mine].copy_(own)
                elif variant == "pypar":
                    self.ops.zero_gather(whole, own, [part] * self.world, group)
                else:
                    dist.all_gather_single(whole, own, group=group)

            return gather, lambda: whole
        if variant == "pypar":
            params = self.symmetric.contiguous([part] * self.world, torch.float32, group)
            params[mine] = 0.5
            states = [torch.zeros(part), torch.zeros(part)]
            count = [0]

            def step() -> None:
                count[0] += 1
                factor = self.factor(scatter(), group)
                self.ops.zero_step(params[mine], shard, *states, count[0], grad_scale=factor, **SETTINGS)
                dist.barrier(group=group)

            return step, lambda: params
        params = torch.full((n,), 0.5)
        own = torch.nn.Parameter(params[mine].clone())
        optimizer = torch.optim.AdamW([own], fused=True, **SETTINGS)

        def torch_step() -> None:
            scatter()
            squares = torch.linalg.vector_norm(shard).double().square()
            shard.mul_(self.factor(squares, None if variant == SHARE else group))
            own.grad = shard
            optimizer.step()
            if variant != SHARE:
                dist.all_gather_single(params, own.detach(), group=group)

        return torch_step, lambda: params

    def factor(self, squares: torch.Tensor, group: Any) -> float:
        """That makes the norm over the ranks MAX_NORM at most."""
        if group is not None:
            dist.all_reduce(squares, group=group)
        return min(1.0, MAX_NORM / (float(squares) ** 0.5 + 1e-6))

    def verify(self, variant: str, case: Case) -> str:
        if variant in (SHARE, BYTES):
            return ""
        run, result = self.prepare(variant, case)
        self.barrier()
        run()
        self.barrier()
        n = self.numel(case.nbytes)
        part = n // self.world
        if case.op == "zero_gather":
            parts = [self.gradients(r, n)[r * part : (r + 1) * part] for r in range(self.world)]
            same = torch.equal(result(), torch.cat(parts).float())
            return "" if same else f"rank {self.rank}: zero_gather is wrong"
        want = self.gradients(0, n)
        for rank in range(1, self.world):
            want += self.gradients(rank, n)
        want /= self.world
        if case.op == "zero_scatter":
            want = want[self.rank * part : (self.rank + 1) * part]
        else:
            p = torch.nn.Parameter(torch.full((n,), 0.5))
            p.grad = want.mul_(self.factor(want.double().square().sum(), None))
            torch.optim.AdamW([p], fused=True, **SETTINGS).step()
            want = p.detach()
        off = (result() - want).abs().max()
        return "" if off < 1e-5 else f"rank {self.rank}: {case.op} is off by {off:g}"

    def measure(self, variant: str, case: Case, iters: int, num_samples: int) -> list[float]:
        run, _ = self.prepare(variant, case)
        self.barrier()
        run()  # touches what is new, and makes the optimizer's states
        return self.timed(run, iters, num_samples)


def ratios_of(results: Sequence[Result]) -> list[report.Ratio]:
    """Of zero_step, where caches don't hold it."""
    times = report.medians(results)

    def over(names: Sequence[str], other: str) -> Callable[[int], float | None]:
        def value(nbytes: int) -> float | None:
            sides = [times[name, nbytes] for name in names if (name, nbytes) in times], times.get((other, nbytes))
            return min(sides[0]) / sides[1] if sides[0] and sides[1] else None

        return value

    def limit(sign: str, bound: float) -> Callable[[int], tuple[str, float] | None]:
        return lambda nbytes: (sign, bound) if nbytes >= IN_MEMORY_BYTES else None

    return [
        report.Ratio("best of gloo / pypar", over(GLOO, "pypar"), limit(">=", 1.5)),
        report.Ratio(f"pypar / {BYTES}", over(["pypar"], BYTES), limit("<=", 1.3)),
    ]


def main(op: str, argv: Sequence[str] | None = None) -> int:
    """1 when a variant was refused, else 0."""
    p = argparse.ArgumentParser(description=f"Bench {op} against torch.distributed's collectives and fused AdamW")
    p.add_argument("--ranks", type=int, default=2, choices=range(2, 5), metavar="2..4")
    p.add_argument("--sizes", type=parse_sizes, default=SIZES, help="bytes of the full gradients, as 1M,64M")
    p.add_argument("--rounds", type=int, default=5, help="of A B A B; default 5")
    args = p.parse_args(argv)
    cases = [Case(op, nbytes, args.ranks) for nbytes in args.sizes]
    pool = RankPool(args.ranks, ZeroRank, max(args.sizes))
    variants = (*VARIANTS, BYTES) if op == "zero_step" else VARIANTS
    try:
        results = harness.run([PoolVariant(name, pool) for name in variants], cases, args.rounds, say=print)
    finally:
        pool.close()
    csv_path = harness.write_csv(f"bench_{op}", results)
    kept = harness.one_regime(results)
    title = f"{op}, {args.ranks} ranks, one thread each, float32, sizes of the full gradients"
    print(f"\n{title}\n{report.table(kept)}")
    if op == "zero_step":
        print("\n" + report.ratio_table(ratios_of(kept), args.sizes))
    print(f"\n{csv_path}\n{report.chart(f'bench_{op}', title, kept)}")
    return 1 if any(r.refused for r in results) else 0
