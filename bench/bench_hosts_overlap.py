"""How much of the communication between hosts the fused matmuls hide: python -m bench.bench_hosts_overlap.

Two hosts with one rank each: network namespaces, joined by a link that is limited to 1 and 10 Gbit/s. M = 2048 rows,
K = N = D float32 over both ranks, so that each multiplies M * D * D. The variants of an op take turns:

  matmul alone  the same matmul on rows that are all here
  whole         num_chunks=1: the rows travel all at once, before the matmul or after it
  decided       as pypar decides for this link, in chunks or whole
  chunked       where it decides against chunks, what 8 would take

With wire = whole - matmul alone, what can be hidden is

  naively             min(wire, matmul) * (1 - 1 / chunks)
  beside the CPU cost min(wire * (1 - wire_cpu), matmul) * (1 - 1 / chunks)

since the share wire_cpu of the wire's time (of the calibration) is taken from the cores that multiply, whatever the
order of things. hidden share = (whole - decided) / either. Exit code 0 and one line where this machine lets nobody make
namespaces.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from bench import harness, hosts, report
from bench.harness import Case, Result
from bench.pool import LIMIT_S, PoolVariant, Rank, RankPool

BENCH = "bench_hosts_overlap"
M, WORLD = 2048, 2
OPS = ("all_gather_matmul", "matmul_reduce_scatter", "matmul_all_reduce")
VARIANTS = ("matmul alone", "whole", "decided", "chunked")
DEFAULT_CHUNKS = 8
TARGET = (">=", 70.0)
NO_SLOWER = ("<=", 1.05)  # than whole
HARDLY = 0.05  # of the whole op; where less can be hidden, its share is noise


def case_of(op: str, width: int, gbit_per_s: float) -> Case:
    return Case(f"{op} {gbit_per_s:g} Gbit/s", 4 * M * width, WORLD)


def width_of(case: Case) -> int:
    return case.nbytes // (4 * M)


class HostRank(Rank):
    """A rank alone on its host."""

    def __init__(self, rank: int, world: int, folder: str, page: str, namespaces: list[str], widest: int):
        hosts.enter(namespaces[rank])
        os.environ["GLOO_SOCKET_IFNAME"] = hosts.INTERFACE
        os.environ["PYPAR_NODE_ID"] = namespaces[rank]
        super().__init__(rank, world, folder, page)
        import pypar

        self.pypar = pypar
        self.group = dist.new_group(backend="pypar", timeout=timedelta(seconds=LIMIT_S))
        self.name = self.group.group_name
        generator = torch.Generator().manual_seed(1)
        self.x = torch.randint(-1, 2, (M, widest), generator=generator).float()
        self.w = torch.randint(-1, 2, (widest, widest), generator=generator).float()

    def calibrate(self) -> Any:
        return self.pypar.calibrate(self.name)

    def explain(self, op: str, width: int) -> tuple[int, str]:
        half = width // WORLD
        shapes = [(M // WORLD, width), (half, width)] if op == "all_gather_matmul" else [(M, half), (width, half)]
        explanation = self.pypar.explain(op, shapes, group=self.name)
        return explanation.num_chunks, explanation.text

    def prepare(self, variant: str, op: str, width: int, chunks: int) -> tuple[Callable[[], Any], Callable[[], Any]]:
        """(the op, what it must give)."""
        x, w = self.x[:, :width], self.w[:width, :width]
        mine = slice(self.rank * M // WORLD, (self.rank + 1) * M // WORLD)
        ops, asked = torch.ops.pypar, {"whole": 1, "decided": 0}.get(variant, chunks)
        if op == "all_gather_matmul":
            full, shard, part = x.contiguous(), x[mine].contiguous(), w.chunk(WORLD)[self.rank].contiguous()
            alone = lambda: full @ part.t()  # noqa: E731
            fused = lambda: ops.all_gather_matmul(shard, [part], [], None, self.name, num_chunks=asked)[0]  # noqa: E731
            return (alone if variant == "matmul alone" else fused), alone
        h, part = (t.chunk(WORLD, 1)[self.rank].contiguous() for t in (x, w))
        alone = lambda: h @ part.t()  # noqa: E731
        if variant == "matmul alone":
            return alone, alone
        if op == "matmul_reduce_scatter":
            run = lambda: ops.matmul_reduce_scatter([h], [part], None, None, None, self.name, num_chunks=asked)  # noqa: E731
            return run, lambda: x[mine] @ w.t()
        return lambda: ops.matmul_all_reduce([h], [part], None, None, self.name, num_chunks=asked), lambda: x @ w.t()

    def verify(self, variant: str, op: str, width: int, chunks: int) -> str:
        run, want = self.prepare(variant, op, width, chunks)
        self.barrier()
        got, expected = run(), want()
        self.barrier()
        return (
            "" if torch.equal(got, expected) else f"rank {self.rank}: {op} is off by {(got - expected).abs().max():g}"
        )

    def measure(self, variant: str, op: str, width: int, chunks: int, iters: int, num_samples: int) -> list[float]:
        run, _ = self.prepare(variant, op, width, chunks)
        return self.timed(run, iters, num_samples)


@dataclass(frozen=True)
class Choice:
    """What pypar decided for a case, and what it knew. chunks: of the variant that is, or would be, in chunks."""

    decided: int
    chunks: int
    wire_cpu: float


Choices = dict[Case, Choice]


class HostVariant(PoolVariant):
    """One of VARIANTS."""

    def __init__(self, name: str, pool: RankPool, choices: Choices):
        super().__init__(name, pool)
        self.choices, self.choice = choices, ""

    def skips(self, case: Case) -> bool:
        return self.name == "chunked" and self.choices[case].decided == self.choices[case].chunks

    def _what(self, case: Case) -> tuple[Any, ...]:
        choice = self.choices[case]
        num_chunks = {"decided": choice.decided, "chunked": choice.chunks}.get(self.name)
        self.choice = "" if num_chunks is None else f"{num_chunks} chunks" if num_chunks > 1 else "whole"
        return self.name, case.op.split()[0], width_of(case), choice.chunks

    def verify(self, case: Case) -> str:
        return next(filter(None, self._pool.ask("verify", *self._what(case))), "")

    def measure(self, case: Case, iters: int, num_samples: int) -> list[float]:
        by_rank = self._pool.ask("measure", *self._what(case), iters, num_samples)
        return [max(us) for us in zip(*by_rank, strict=True)]


@dataclass(frozen=True)
class Hidden:
    """Microseconds of one case: what can be hidden, naively and beside the CPU cost, and what is."""

    whole: float
    decided: float
    naive: float
    beside_cpu: float

    def share(self, most: float) -> float | None:
        """Per cent of `most`; None where there is hardly anything to hide."""
        return 100 * (self.whole - self.decided) / most if most >= HARDLY * self.whole else None


def hidden(times: report.Times, case: Case, choice: Choice) -> Hidden | None:
    alone, whole, decided = (times.get((name, case.nbytes)) for name in VARIANTS[:3])
    if alone is None or whole is None or decided is None:
        return None
    wire, part = max(0.0, whole - alone), 1 - 1 / choice.chunks
    return Hidden(whole, decided, part * min(wire, alone), part * min(wire * (1 - choice.wire_cpu), alone))


def ratios_of(op: str, kept: Sequence[Result], choices: Choices) -> list[report.Ratio]:
    mine = [r for r in kept if r.case.op == op]
    times = report.medians(mine)
    by_size = {r.case.nbytes: hidden(times, r.case, choices[r.case]) for r in mine}

    def ratio(name: str, of: Callable[[Hidden], float | None], target: tuple[str, float]) -> report.Ratio:
        def value(nbytes: int) -> float | None:
            found = by_size.get(nbytes)
            return None if found is None else of(found)

        return report.Ratio(f"{op}: {name}", value, lambda nbytes: None if value(nbytes) is None else target)

    return [
        ratio("hidden, % of the naive arithmetic", lambda h: h.share(h.naive), TARGET),
        ratio("hidden, % beside the CPU cost", lambda h: h.share(h.beside_cpu), TARGET),
        ratio("decided / whole", lambda h: h.decided / h.whole, NO_SLOWER),
    ]


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog=f"python -m bench.{BENCH}", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--widths", type=int, nargs="+", default=[1024, 2048, 4096], metavar="D", help="K = N = D")
    p.add_argument("--gbits", type=float, nargs="+", default=[1, 10], metavar="G", help="rates of the link")
    p.add_argument("--ops", nargs="+", choices=OPS, default=list(OPS), metavar="OP", help=f"of {', '.join(OPS)}")
    p.add_argument("--chunks", type=int, default=0, help="of the variant in chunks, instead of pypar's number or 8")
    p.add_argument("--rounds", type=int, default=5, help="of A B C A B C; default 5")
    p.add_argument("--folder", type=Path, default=harness.RESULTS, help=argparse.SUPPRESS)
    return p


def run_rate(gbit: float, args: argparse.Namespace, pool: RankPool) -> tuple[list[Result], Choices]:
    calibration = pool.ask("calibrate")[0]
    print(f"\nlink of {gbit:g} Gbit/s: {calibration}")
    choices: Choices = {}
    for op in args.ops:
        for width in args.widths:
            decided, text = pool.ask("explain", op, width)[0]
            chunks = args.chunks or (decided if decided > 1 else DEFAULT_CHUNKS)
            choices[case_of(op, width, gbit)] = Choice(decided, chunks, calibration.wire_cpu)
            print(text)
    variants = [HostVariant(name, pool, choices) for name in VARIANTS]
    results = harness.run(variants, list(choices), args.rounds, 0, print, min_samples=3, patience=2)
    return results, choices


def publish(results: list[Result], choices: Choices, folder: Path) -> None:
    kept = [r for case in choices for r in harness.one_regime([r for r in results if r.case == case])]
    ops = list(dict.fromkeys(case.op for case in choices))
    ratios = [ratio for op in ops for ratio in ratios_of(op, kept, choices)]
    for result in results:
        of_regime = [r for r in results if r.case == result.case and r.regime == result.regime]
        found = hidden(report.medians(of_regime), result.case, choices[result.case])
        result.extra = (
            columns_of(found, choices[result.case]) if result.variant == "decided" else columns_of(None, None)
        )
    for op in ops:
        print(f"\n{op}, {M} rows, sizes of the rows that travel\n{report.table([r for r in kept if r.case.op == op])}")
    sizes = sorted({case.nbytes for case in choices})
    print(f"\n{report.ratio_table(ratios, sizes)}")
    print(f"no share where less than {100 * HARDLY:g} % of the whole op can be hidden")
    print(f"\n{harness.write_csv(BENCH, results, folder)}\n{chart(kept, ratios, folder)}")


def columns_of(found: Hidden | None, choice: Choice | None) -> dict[str, str]:
    def text(share: float | None) -> str:
        return "" if share is None else f"{share / 100:.3f}"

    if found is None or choice is None:
        return dict.fromkeys(("wire_cpu", "hideable_us", "hideable_cpu_us", "hidden_share", "hidden_cpu_share"), "")
    return {
        "wire_cpu": f"{choice.wire_cpu:g}",
        "hideable_us": f"{found.naive:.0f}",
        "hideable_cpu_us": f"{found.beside_cpu:.0f}",
        "hidden_share": text(found.share(found.naive)),
        "hidden_cpu_share": text(found.share(found.beside_cpu)),
    }


def chart(kept: Sequence[Result], ratios: Sequence[report.Ratio], folder: Path) -> Path:
    """A panel per op and rate: the times of the variants side by side by width, decided / whole below them."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    ops = list(dict.fromkeys(r.case.op for r in kept))
    columns = min(3, len(ops))
    figure, grid = pyplot.subplots(
        -(-len(ops) // columns), columns, figsize=(5 * columns, 4 * -(-len(ops) // columns)), layout="constrained",
        squeeze=False,
    )  # fmt: skip
    by_name = {ratio.name: ratio for ratio in ratios}
    for axes, op in zip(grid.flat, ops, strict=False):
        widths = sorted({width_of(r.case) for r in kept if r.case.op == op})
        for k, name in enumerate(VARIANTS):
            rows = {width_of(r.case): r for r in kept if r.case.op == op and r.variant == name and r.us}
            at = [i + 0.2 * (k - 1.5) for i, width in enumerate(widths) if width in rows]
            ms = [rows[width].median_us / 1e3 for width in widths if width in rows]
            axes.bar(at, ms, 0.18, label=name, color=("0.7", "C1", "C0", "C9")[k])
        factors = [by_name[f"{op}: decided / whole"].value(4 * M * width) for width in widths]
        marks = [
            f"K = N = {width}" + (f"\ndecided / whole {factor:.2f}" if factor is not None else "")
            for width, factor in zip(widths, factors, strict=True)
        ]
        axes.set_xticks(range(len(widths)), marks)
        axes.set_title(op, fontsize=10)
        axes.set_ylabel("median time, ms")
        axes.grid(True, axis="y", alpha=0.25)
        axes.set_axisbelow(True)
        axes.legend(fontsize=8)
    figure.suptitle(f"two emulated hosts, one rank with one thread each, M = {M}, float32")
    path = folder / f"{BENCH}.png"
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return path


def main(argv: Sequence[str] | None = None) -> int:
    """1 when a variant was refused, else 0."""
    args = parser().parse_args(argv)
    results: list[Result] = []
    choices: Choices = {}
    try:
        with hosts.TwoHosts() as two:
            pool = RankPool(WORLD, HostRank, two.names, max(args.widths))
            try:
                for gbit in args.gbits:
                    two.limit(gbit)
                    of_rate, of_cases = run_rate(gbit, args, pool)
                    results += of_rate
                    choices |= of_cases
            finally:
                pool.close()
    except hosts.NoRights as error:
        print(f"{BENCH}: skipped, this machine or user can't make network namespaces: {error}")
        return 0
    publish(results, choices, args.folder)
    return 1 if any(r.refused for r in results) else 0


if __name__ == "__main__":
    sys.exit(main())
