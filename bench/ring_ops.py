"""The bench of the rings: a tensor from one rank to the other and back, half of the time of both ways.

ring copies the tensor into the slot; in place, it was made there (the time is that of handing it over); both read it
where it lies. send through torch.distributed, over gloo and pypar, copies into a tensor of the receiver. memcpy is one
rank that copies as much by itself. bench_ring_send.py and bench_ring_recv.py are doors to main() here.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from bench import harness, programs, report
from bench.collectives import SIZES, parse_sizes
from bench.harness import Case, Variant
from bench.pool import LIMIT_S, PoolVariant, Rank, RankPool

VARIANTS = ("memcpy", "gloo", "pypar dist", "pypar ring", "pypar ring in place")
SLOTS = 2  # what 1F1B needs on two ranks


class RingRank(Rank):
    def __init__(self, rank: int, world: int, folder: str, page: str, max_bytes: int):
        super().__init__(rank, world, folder, page)
        from pypar.pipeline_parallel.ring import Edge, make_rings

        group = dist.new_group(backend="pypar", timeout=timedelta(seconds=LIMIT_S))
        self.groups: dict[str, Any] = {"gloo": dist.group.WORLD, "pypar dist": group}
        edges = [Edge(0, 1, SLOTS, max_bytes + 256), Edge(1, 0, SLOTS, max_bytes + 256)]
        self.there, self.back = make_rings(edges, group).values()
        self.data = torch.arange(max(1, max_bytes // 4), dtype=torch.float32)
        self.into = torch.empty_like(self.data)

    def one_way_twice(self, variant: str, numel: int) -> torch.Tensor:
        """Rank 0 sends, rank 1 sends back; what this rank received."""
        x, into = self.data[:numel], self.into[:numel]
        if variant == "memcpy":
            into.copy_(x)
            into.copy_(x)
            return into
        if variant in self.groups:
            group, peer = self.groups[variant], 1 - self.rank
            if self.rank == 0:
                dist.send(x, group=group, group_dst=peer)
                dist.recv(into, group=group, group_src=peer)
            else:
                dist.recv(into, group=group, group_src=peer)
                dist.send(into, group=group, group_dst=peer)
            return into
        out, back = (self.there, self.back) if self.rank == 0 else (self.back, self.there)
        in_place = variant.endswith("in place")
        if self.rank == 0:
            out.send([out.empty((numel,), torch.float32) if in_place else x], 0)
            return back.recv()[0][0]
        (received,), _ = back.recv()
        out.send([out.empty((numel,), torch.float32) if in_place else received], 0)
        return received

    def verify(self, variant: str, case: Case) -> str:
        numel = case.nbytes // 4
        if variant.endswith("in place"):
            for _ in range(2 * SLOTS):  # every slot, filled once
                ring = self.there if self.rank == 0 else self.back
                ring.empty((numel,), torch.float32).copy_(self.data[:numel])
                got = self.one_way_twice(variant, numel)
                if not torch.equal(got, self.data[:numel]):
                    return f"rank {self.rank}: another tensor came"
            return ""
        self.into.zero_()
        got = self.one_way_twice(variant, numel)
        return "" if torch.equal(got, self.data[:numel]) else f"rank {self.rank}: another tensor came"

    def measure(self, variant: str, case: Case, iters: int, num_samples: int) -> list[float]:
        numel = case.nbytes // 4
        return [us / 2 for us in self.timed(lambda: self.one_way_twice(variant, numel), iters, num_samples)]


def ratios(results: Sequence[harness.Result]) -> list[report.Ratio]:
    times = report.medians(results)

    def over(a: str, b: str) -> Any:
        return lambda s: times[a, s] / times[b, s] if (a, s) in times and (b, s) in times else None

    return [
        report.Ratio("gloo / ring", over("gloo", "pypar ring"), lambda s: None),
        report.Ratio("pypar dist / ring", over("pypar dist", "pypar ring"), lambda s: None),
        report.Ratio("memcpy / ring", over("memcpy", "pypar ring"), lambda s: (">=", 0.8) if s >= 4 << 20 else None),
        report.Ratio("ring, us", lambda s: times.get(("pypar ring", s)), lambda s: ("<=", 3.0) if s <= 64 else None),
    ]


def main(op: str, argv: Sequence[str] | None = None) -> int:
    """1 when a variant was refused, else 0."""
    p = argparse.ArgumentParser(description=f"Bench {op}: {(__doc__ or '').splitlines()[0]}")
    p.add_argument("--sizes", type=parse_sizes, default=(64, *SIZES[1:]), help="bytes of the tensor, as 64,16K,4M")
    p.add_argument("--rounds", type=int, default=5, help="of A B A B; default 5")
    p.add_argument("--no-peers", action="store_true", help="without MPI and oneCCL")
    args = p.parse_args(argv)
    cases = [Case("send", max(4, nbytes), 2) for nbytes in args.sizes]
    pool = RankPool(2, RingRank, max(args.sizes))
    peers = [] if args.no_peers else programs.peers(2, max(args.sizes), print)
    variants: list[Variant] = [*(PoolVariant(name, pool) for name in VARIANTS), *peers]
    try:
        results = harness.run(variants, cases, args.rounds, say=print)
    finally:
        pool.close()
        for peer in peers:
            peer.program.close()
    path = harness.write_csv(f"bench_{op}", results)
    kept = harness.one_regime(results)
    title = "one way from rank to rank, one thread each, float32"
    sizes = sorted({r.case.nbytes for r in kept})
    print(f"\n{title}\n{report.table(kept)}\n\n{report.ratio_table(ratios(kept), sizes)}\n\n{path}")
    print(report.chart(f"bench_{op}", title, kept))
    return 1 if any(r.refused for r in results) else 0
