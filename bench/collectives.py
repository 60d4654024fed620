"""The bench of one collective: gloo, pypar in each of its forms, the C references and the peers, in one run.

Every size is timed by all variants in turn before the next size: A B A B. bench_<op>.py are doors to main() here.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence

from bench import harness, native, programs, ranks, report
from bench.harness import Case, Result, Variant, size_name
from bench.pool import RankPool

OPS = ("all_reduce", "reduce_scatter", "all_gather", "all_to_all", "broadcast", "send")
SIZES = tuple(8 << k for k in (0, 7, 11, 13, 15, 17, 19, 21, 23))  # 8 B, 1 KiB, 16 KiB, 64 KiB, ... 64 MiB
QUICK_SIZES = (8, 16 << 10, 256 << 10, 1 << 20, 4 << 20)
KIB, MIB = 1 << 10, 1 << 20
Say = Callable[[str], None]
Limit = tuple[str, float]


def parse_size(text: str) -> int:
    """8, 16K, 1M, also 16KiB."""
    text = text.strip().upper().removesuffix("IB").removesuffix("B")
    unit = {"K": KIB, "M": MIB, "G": 1 << 30}.get(text[-1:], 1)
    try:
        return int(text[:-1] if unit > 1 else text) * unit
    except ValueError:
        raise argparse.ArgumentTypeError(f"not a size: {text!r} (8, 16K, 1M)") from None


def parse_sizes(text: str) -> tuple[int, ...]:
    return tuple(parse_size(part) for part in text.split(","))


def best_peer(times: report.Times, nbytes: int) -> float | None:
    peers = [name for peer in programs.PEERS for name in (peer, f"{peer} out of place")]
    return min((times[name, nbytes] for name in peers if (name, nbytes) in times), default=None)


def targets(op: str, num_ranks: int, results: Sequence[Result]) -> list[report.Ratio]:
    """The ratios that the project holds itself to, and what they must be."""
    times = report.medians(results)
    regimes = {r.case.nbytes: r.regime for r in results if not r.refused}
    ordinary, symmetric = ("pypar dist", "pypar dist symmetric") if op == "send" else ("pypar op", "pypar op symmetric")

    def over(a: str, b: str) -> Callable[[int], float | None]:
        return lambda s: times[a, s] / times[b, s] if (a, s) in times and (b, s) in times else None

    def peer_ratio(nbytes: int) -> float | None:
        best = best_peer(times, nbytes)
        return best / times[ordinary, nbytes] if best and (ordinary, nbytes) in times else None

    def against_gloo(nbytes: int) -> Limit:
        if num_ranks > 2:
            return ">=", 1.0
        return ">=", 20.0 if nbytes <= 16 * KIB else 3.0 if nbytes >= MIB else 1.0

    def if_two(limit: Limit, low: int, high: int = 1 << 62, fast: bool = False) -> Callable[[int], Limit | None]:
        def at(nbytes: int) -> Limit | None:
            held = num_ranks == 2 and low <= nbytes <= high and (not fast or regimes.get(nbytes) == "fast")
            return limit if held else None

        return at

    rows = [
        report.Ratio("gloo / pypar dist", over("gloo", "pypar dist"), against_gloo),
        report.Ratio(f"best peer / {ordinary}", peer_ratio, if_two((">=", 1.0), MIB, fast=True)),
        report.Ratio(f"{ordinary} / reference staged", over(ordinary, "reference staged"), if_two(("<=", 1.5), MIB)),
        report.Ratio(
            f"{symmetric} / reference symmetric",
            over(symmetric, "reference symmetric"),
            if_two(("<=", 1.5), 256 * KIB),
        ),
        report.Ratio("pypar dist, us", lambda s: times.get(("pypar dist", s)), if_two(("<=", 20.0), 0, 8)),
    ]
    if op != "send":
        rows.append(report.Ratio("pypar op, us", lambda s: times.get(("pypar op", s)), if_two(("<=", 5.0), 0, 8)))
    return rows


class Bench:
    """The variants of one number of ranks. Close it: it holds processes."""

    def __init__(self, num_ranks: int, max_bytes: int, with_peers: bool = True, say: Say = print):
        self.num_ranks = num_ranks
        usable = ranks.usable()
        missing = [name for name in ranks.VARIANTS if name not in usable]
        if missing:
            say(f"skipped, the compiled extension does not offer them here: {', '.join(missing)}")
        self.pool = RankPool(num_ranks, ranks.CollectiveRank, max_bytes, len(usable) > 1)
        self.programs: list[programs.ProgramVariant] = []
        for kind in ("staged", "symmetric"):
            try:
                self.programs.append(programs.reference(kind, num_ranks, max_bytes))
            except native.BuildError as error:
                say(f"reference {kind}: skipped, {error}")
        if with_peers:
            self.programs += programs.peers(num_ranks, max_bytes, say)
        self.variants: list[Variant] = [*(ranks.CollectiveVariant(name, self.pool) for name in usable), *self.programs]

    def __enter__(self) -> Bench:
        return self

    def __exit__(self, *error: object) -> None:
        self.pool.close()
        for variant in self.programs:
            variant.program.close()

    def run(self, op: str, sizes: Sequence[int], rounds: int, budget_us: float, say: Say = print) -> list[Result]:
        smallest = 4 * self.num_ranks  # one element per rank
        cases = [Case(op, nbytes, self.num_ranks) for nbytes in sorted({max(s, smallest) for s in sizes})]
        return harness.run(self.variants, cases, rounds, budget_us, say)


def publish(op: str, num_ranks: int, results: Sequence[Result]) -> bool:
    """Prints the tables, writes the CSV rows and the chart. False when a variant was refused."""
    bench = "bench_send_recv" if op == "send" else f"bench_{op}"
    csv_path = harness.write_csv(bench, results)
    results = harness.one_regime(results)
    sizes = sorted({r.case.nbytes for r in results})
    print(f"\n{op}, {num_ranks} ranks, one thread each, float32\n{report.table(results)}")
    print(f"\n{report.ratio_table(targets(op, num_ranks, results), sizes)}")
    suffix = "" if num_ranks == 2 else f"_{num_ranks}ranks"
    regimes = ", ".join(sorted({r.regime for r in results if r.regime}))
    title = f"{op}, {num_ranks} ranks on one host, one thread each, float32 ({regimes} regime)"
    png_path = report.chart(bench + suffix, title, results)
    print(f"\n{csv_path}\n{png_path}")
    return not any(r.refused for r in results)


def parser(description: str) -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=description)
    p.add_argument("--ranks", type=int, default=2, choices=range(2, 9), metavar="2..8")
    p.add_argument("--sizes", type=parse_sizes, help=f"as 8,16K,1M; default {','.join(map(size_name, SIZES))}")
    p.add_argument("--quick", action="store_true", help="few sizes, few rounds: a smoke test")
    p.add_argument("--rounds", type=int, help="of A B A B; default 7, quick 3")
    p.add_argument("--no-peers", action="store_true", help="without MPI and oneCCL")
    return p


def run_ops(ops: Sequence[str], args: argparse.Namespace) -> int:
    """1 when a variant was refused on a case, else 0."""
    sizes = args.sizes or (QUICK_SIZES if args.quick else SIZES)
    rounds = args.rounds or (3 if args.quick else 7)
    right = True
    with Bench(args.ranks, max(*sizes, 4 * args.ranks), not args.no_peers) as bench:
        for op in ops:
            results = bench.run(op, sizes, rounds, 5_000 if args.quick else 20_000)
            right = publish(op, args.ranks, results) and right
    return 0 if right else 1


def main(op: str, argv: Sequence[str] | None = None) -> int:
    return run_ops([op], parser(f"Bench {op} against gloo, MPI, oneCCL and plain C").parse_args(argv))
