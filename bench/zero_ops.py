"""The benches of ZeRO's ops: gradients to shards, and a whole step from gradients to published parameters.

A case is named by the bytes of the full gradients, float32. zero_scatter: against all_reduce over gloo and
reduce_scatter through torch.distributed. zero_gather: against all_gather over gloo and through torch.distributed, into
symmetric memory. zero_step: reduce, AdamW on the own shard, parameters to everybody; torch's
fused AdamW between gloo's collectives, the same over pypar, and pypar's ops on parameters that exist once.
"one rank's share" is the compute alone. bench_<op>.py are doors to main() here.
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
from bench.harness import Case
from bench.pool import LIMIT_S, PoolVariant, Rank, RankPool

SIZES = (1 << 20, 16 << 20, 128 << 20)
VARIANTS = ("one rank's share", "gloo", "pypar dist", "pypar")
SETTINGS = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


class ZeroRank(Rank):
    """Holds gradients, parameters and AdamW's states, each of its own for every variant."""

    def __init__(self, rank: int, world: int, folder: str, page: str, max_bytes: int):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[rank % len(cores)]})
        super().__init__(rank, world, folder, page)
        import pypar
        from pypar import symmetric

        self.ops, self.symmetric = pypar.ops, symmetric
        self.groups: dict[str, Any] = {"gloo": dist.group.WORLD}
        self.groups["pypar"] = dist.new_group(backend="pypar", timeout=timedelta(seconds=LIMIT_S))
        self.numel = -(-(max_bytes // 4) // (1024 * world)) * 1024 * world
        self.part = self.numel // world
        self.grads = [self._numbers(r) for r in range(world)]
        self.window = symmetric.empty(self.numel, torch.float32, self.groups["pypar"])
        self.built: dict[str, Any] = {}

    def _numbers(self, seed: int) -> torch.Tensor:
        return torch.randn(self.numel, generator=torch.Generator().manual_seed(seed))

    def prepare(self, variant: str, case: Case) -> tuple[Callable[[], Any], Callable[[], torch.Tensor]]:
        """(what is timed, the result that is checked)"""
        n = case.nbytes // 4 // (1024 * self.world) * 1024 * self.world
        part = n // self.world
        mine = slice(self.rank * part, (self.rank + 1) * part)
        name = "gloo" if variant == "gloo" else "pypar"
        group, fused = self.groups[name], variant == "pypar"
        full = self.window[:n].copy_(self.grads[self.rank][:n]) if fused else self.grads[self.rank][:n].clone()
        shard = torch.empty(part)

        def scatter() -> None:
            if variant == "one rank's share":
                torch.mul(full[mine], 1.0, out=shard)
            elif fused:
                self.ops.zero_scatter(shard, full, [part] * self.world, group, scale=1 / self.world)
            elif variant == "gloo":  # whose reduce_scatter is an all_reduce of everything as well
                work = full.clone()
                dist.all_reduce(work, group=group)
                torch.div(work[mine], self.world, out=shard)
            else:
                dist.reduce_scatter_tensor(shard, full, dist.ReduceOp.AVG, group)

        if case.op == "zero_scatter":
            return scatter, lambda: shard
        if case.op == "zero_gather":
            own = self.grads[self.rank][mine].clone()
            whole = full.zero_()

            def gather() -> None:
                if variant == "one rank's share":
                    whole[mine].copy_(own)
                elif fused:
                    self.ops.zero_gather(whole, own, [part] * self.world, group)
                else:
                    dist.all_gather_single(whole, own, group=group)

            return gather, lambda: whole
        start = torch.full((n,), 0.5)
        if fused:
            params = self.symmetric.contiguous([part] * self.world, torch.float32, group)
            params[mine] = 0.5
            states = [torch.zeros(part), torch.zeros(part)]
            count = [0]
        else:
            params = start
            own = torch.nn.Parameter(params[mine].clone())
            optimizer = torch.optim.AdamW([own], fused=True, **SETTINGS)

        def step() -> None:
            scatter()
            if fused:
                count[0] += 1
                self.ops.zero_step(params[mine], shard, *states, count[0], **SETTINGS)
                dist.barrier(group=group)
                return
            own.grad = shard
            optimizer.step()
            if variant != "one rank's share":
                dist.all_gather_single(params, own.detach(), group=group)

        return step, lambda: params if variant != "one rank's share" else own.detach()

    def verify(self, variant: str, case: Case) -> str:
        run, result = self.prepare(variant, case)
        self.barrier()
        run()
        self.barrier()
        if variant == "one rank's share":
            return ""
        n = case.nbytes // 4 // (1024 * self.world) * 1024 * self.world
        part = n // self.world
        if case.op == "zero_gather":
            parts = [g[r * part : (r + 1) * part] for r, g in enumerate(self.grads)]
            same = torch.equal(result(), torch.cat(parts))
            return "" if same else f"rank {self.rank}: zero_gather is wrong"
        want = sum(g[:n].double() for g in self.grads) / self.world
        if case.op == "zero_scatter":
            want = want[self.rank * part : (self.rank + 1) * part]
        else:
            p = torch.nn.Parameter(torch.full((n,), 0.5, dtype=torch.float64))
            p.grad = want
            torch.optim.AdamW([p], **SETTINGS).step()
            want = p.detach()
        off = (result().double() - want).abs().max()
        return "" if off < 1e-5 else f"rank {self.rank}: {case.op} is off by {off:g}"

    def measure(self, variant: str, case: Case, iters: int, num_samples: int) -> list[float]:
        run, _ = self.prepare(variant, case)
        return self.timed(run, iters, num_samples)


def main(op: str, argv: Sequence[str] | None = None) -> int:
    """1 when a variant was refused, else 0."""
    p = argparse.ArgumentParser(description=f"Bench {op} against torch.distributed's collectives and fused AdamW")
    p.add_argument("--ranks", type=int, default=2, choices=range(2, 5), metavar="2..4")
    p.add_argument("--sizes", type=parse_sizes, default=SIZES, help="bytes of the full gradients, as 1M,64M")
    p.add_argument("--rounds", type=int, default=5, help="of A B A B; default 5")
    args = p.parse_args(argv)
    cases = [Case(op, nbytes, args.ranks) for nbytes in args.sizes]
    pool = RankPool(args.ranks, ZeroRank, max(args.sizes))
    try:
        results = harness.run([PoolVariant(name, pool) for name in VARIANTS], cases, args.rounds, say=print)
    finally:
        pool.close()
    csv_path = harness.write_csv(f"bench_{op}", results)
    kept = harness.one_regime(results)
    title = f"{op}, {args.ranks} ranks, one thread each, float32, sizes of the full gradients"
    print(f"\n{title}\n{report.table(kept)}\n\n{csv_path}\n{report.chart(f'bench_{op}', title, kept)}")
    return 1 if any(r.refused for r in results) else 0
