"""How much of the gathers between hosts ZeRO stage 3 hides: python -m bench.bench_zero_prefetch.

Two hosts with one rank each: network namespaces, joined by a link that is limited to 1 and 10 Gbit/s. 8 units of two
matmuls, D -> 4 D -> D, 256 rows, float32; forward and a backward that only adds up (no_sync), so that nothing travels
but what is gathered: half of every unit, in forward and again in backward. Three variants take turns:

  compute alone          the same on parameters that are all here
  gathered when needed   prefetch taken out
  prefetched             as users get it

hidden share = (when needed - prefetched) / min(wire, compute), wire = when needed - compute alone. Exit code 0 and one
line where this machine lets nobody make namespaces.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from bench import harness, hosts, report
from bench.harness import Case, Result
from bench.pool import LIMIT_S, PoolVariant, Rank, RankPool

BENCH = "bench_zero_prefetch"
WORLD, NUM_UNITS, ROWS = 2, 8, 256
VARIANTS = ("compute alone", "gathered when needed", "prefetched")
TARGET = (">=", 70.0)


def case_of(width: int, gbit_per_s: float) -> Case:
    return Case(f"forward and backward {gbit_per_s:g} Gbit/s", 4 * 8 * width * width, WORLD)


def width_of(case: Case) -> int:
    return round((case.nbytes / 32) ** 0.5)


class Block(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.up, self.down = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.relu(self.up(x)))


def model_of(width: int) -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(*(Block(width) for _ in range(NUM_UNITS)))


class ZeroHostRank(Rank):
    """A rank alone on its host."""

    def __init__(self, rank: int, world: int, folder: str, page: str, namespaces: list[str]):
        hosts.enter(namespaces[rank])
        os.environ["GLOO_SOCKET_IFNAME"] = hosts.INTERFACE
        os.environ["PYPAR_NODE_ID"] = namespaces[rank]
        super().__init__(rank, world, folder, page)
        import pypar  # noqa: F401  (registers the backend)

        self.group = dist.new_group(backend="pypar", timeout=timedelta(seconds=LIMIT_S))
        self.built: dict[int, tuple[nn.Module, Any]] = {}

    def prepare(self, variant: str, width: int) -> Callable[[], torch.Tensor]:
        import pypar
        from pypar.zero.order import Order

        if width not in self.built:
            self.built = {width: (model_of(width), pypar.Zero(model_of(width), self.group, stage=3))}
        plain, sharded = self.built[width]
        x = torch.randn(ROWS, width, generator=torch.Generator().manual_seed(self.rank))
        real = self.__dict__.setdefault("next", Order.next)
        Order.next = real if variant == "prefetched" else property(lambda _: None)  # type: ignore[assignment]

        def run() -> torch.Tensor:
            model = plain if variant == "compute alone" else sharded
            for parameter in model.parameters():
                parameter.grad = None
            if model is plain:
                loss = model(x).square().mean()
                loss.backward()
                return loss.detach()
            with sharded.no_sync():
                loss = model(x).square().mean()
                loss.backward()
            return loss.detach()

        return run

    def verify(self, variant: str, width: int) -> str:
        run, want = self.prepare(variant, width), self.prepare("compute alone", width)
        expected = want()
        gradients = [p.grad.clone() for p in self.built[width][0].parameters() if p.grad is not None]
        self.barrier()
        run = self.prepare(variant, width)
        for _ in range(2):  # the second knows the order of the first
            found = run()
        self.barrier()
        model = self.built[width][0 if variant == "compute alone" else 1]
        same = torch.equal(found, expected) and all(
            p.grad is not None and torch.equal(p.grad, g) for p, g in zip(model.parameters(), gradients, strict=True)
        )
        return "" if same else f"rank {self.rank}: {variant} gives another loss or gradient"

    def measure(self, variant: str, width: int, iters: int, num_samples: int) -> list[float]:
        run = self.prepare(variant, width)
        run()
        return self.timed(run, iters, num_samples)


class ZeroHostVariant(PoolVariant):
    """One of VARIANTS."""

    def verify(self, case: Case) -> str:
        return next(filter(None, self._pool.ask("verify", self.name, width_of(case))), "")

    def measure(self, case: Case, iters: int, num_samples: int) -> list[float]:
        by_rank = self._pool.ask("measure", self.name, width_of(case), iters, num_samples)
        return [max(us) for us in zip(*by_rank, strict=True)]


def hidden(times: report.Times, nbytes: int) -> float | None:
    """Per cent of what can be hidden."""
    alone, needed, prefetched = (times.get((name, nbytes)) for name in VARIANTS)
    if alone is None or needed is None or prefetched is None or needed <= alone:
        return None
    return 100 * (needed - prefetched) / min(needed - alone, alone)


def ratio_of(op: str, kept: Sequence[Result]) -> report.Ratio:
    times = report.medians([r for r in kept if r.case.op == op])
    return report.Ratio(f"hidden, {op}, %", lambda s: hidden(times, s), lambda _: TARGET)  # type: ignore[arg-type]


def main(argv: Sequence[str] | None = None) -> int:
    """1 when a variant was refused, else 0."""
    p = argparse.ArgumentParser(
        prog=f"python -m bench.{BENCH}", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--widths", type=int, nargs="+", default=[256, 512], metavar="D")
    p.add_argument("--gbits", type=float, nargs="+", default=[1, 10], metavar="G", help="rates of the link")
    p.add_argument("--rounds", type=int, default=3, help="of A B C A B C; default 3")
    p.add_argument("--folder", type=Path, default=harness.RESULTS, help=argparse.SUPPRESS)
    args = p.parse_args(argv)
    results: list[Result] = []
    try:
        with hosts.TwoHosts() as two:
            pool = RankPool(WORLD, ZeroHostRank, two.names)
            try:
                for gbit in args.gbits:
                    two.limit(gbit)
                    cases = [case_of(width, gbit) for width in args.widths]
                    variants = [ZeroHostVariant(name, pool) for name in VARIANTS]
                    results += harness.run(variants, cases, args.rounds, 0, print, min_samples=3, patience=2)
            finally:
                pool.close()
    except hosts.NoRights as error:
        print(f"{BENCH}: skipped, this machine or user can't make network namespaces: {error}")
        return 0
    kept = [r for case in dict.fromkeys(r.case for r in results) for r in harness.one_regime(_of(results, case))]
    for op in dict.fromkeys(r.case.op for r in kept):
        print(f"\n{op}, {NUM_UNITS} units, sizes of a unit\n{report.table([r for r in kept if r.case.op == op])}")
    ratios = [ratio_of(op, kept) for op in dict.fromkeys(r.case.op for r in kept)]
    print(f"\n{report.ratio_table(ratios, sorted({r.case.nbytes for r in kept}))}")
    print(f"\n{harness.write_csv(BENCH, results, args.folder)}")
    return 1 if any(r.refused for r in results) else 0


def _of(results: Sequence[Result], case: Case) -> list[Result]:
    return [r for r in results if r.case == case]


if __name__ == "__main__":
    sys.exit(main())
