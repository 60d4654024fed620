"""Memory of a rank, measured and by formula, under data parallel and pypar.Zero: python -m bench.bench_zero_memory.

A decoder of 106 million parameters (32 layers, d = 512) learns for two steps of a few tokens with AdamW in float32, and
stops behind optimizer.step(), where weights, gradients and both moments are there. Measured is the proportional set
size (Pss of /proc/self/smaps_rollup: pages that n processes map count 1/n to each) less what the rank had before it
built the model. The ranks are on one host. P: bytes of the parameters.

  formula       with the host's parameters once: data parallel 4P; stage 1: P + 3P/N; stages 2 and 3: 4P/N + a unit
  of the paper  with the parameters on every rank: data parallel 4P; 1: 2P + 2P/N; 2: P + 3P/N; 3: 4P/N

The unit is the largest one's gradients, which are full from its backward to their reduction. Over gloo nothing is
shared: each rank has its own parameters, at stage 3 the whole ones of a unit at a time.
"""

from __future__ import annotations

import argparse
import csv
import ctypes
import datetime
import gc
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from bench import harness, report
from bench.models import GPT, GPTConfig

BENCH = "bench_zero_memory"
CONFIGS = {"full": GPTConfig(32, 512, 8, 1408), "quick": GPTConfig(4, 128, 4, 352, 512)}
WITHIN = 0.10  # of the formula
TOKENS = 8


@dataclass(frozen=True)
class Way:
    """stage: 0 for pypar.DataParallel."""

    stage: int
    backend: str

    @property
    def name(self) -> str:
        return (f"zero {self.stage}" if self.stage else "data parallel") + ("" if self.backend == "pypar" else " gloo")

    def paper(self, size: float, n: int) -> float:
        """Bytes of a rank: weights, gradients, two moments."""
        return (4 * size, 2 * size + 2 * size / n, size + 3 * size / n, 4 * size / n)[self.stage]

    def formula(self, size: float, n: int, unit: float) -> float:
        """The same, with parameters once per host where the ranks share memory, and a unit's gradients."""
        once = self.stage in (1, 2) and self.backend == "pypar"
        return self.paper(size, n) - (size - size / n if once else 0) + (unit if self.stage >= 2 else 0)


WAYS = [Way(stage, "pypar") for stage in range(4)] + [Way(stage, "gloo") for stage in range(1, 4)]


@dataclass
class Row:
    way: Way
    num_ranks: int
    size: int  # bytes of the parameters
    unit: int  # bytes of the largest unit
    measured: list[int]  # by rank
    parameters: float  # of the host, bytes: shared mappings of ZeRO, summed over the ranks

    @property
    def per_rank(self) -> float:
        return sum(self.measured) / len(self.measured)

    @property
    def formula(self) -> float:
        return self.way.formula(self.size, self.num_ranks, self.unit)

    @property
    def paper(self) -> float:
        return self.way.paper(self.size, self.num_ranks)

    @property
    def ratio(self) -> float:
        return self.per_rank / self.formula

    @property
    def verdict(self) -> str:
        return "PASS" if abs(self.ratio - 1) <= WITHIN else "MISS"


def pss(kind: str = "Pss") -> int:
    """Bytes of this process that count to it."""
    text = Path("/proc/self/smaps_rollup").read_text()
    found = re.search(rf"^{kind}:\s+(\d+) kB", text, re.MULTILINE)
    assert found is not None
    return 1024 * int(found[1])


def settled(kind: str = "Pss") -> int:
    """The same, when every rank has come here and given back what it does not use."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    dist.barrier()
    value = pss(kind)
    dist.barrier()
    return value


def learn(way: Way, config: GPTConfig, num_steps: int = 2) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    import pypar

    torch.manual_seed(0)
    model = GPT(config)
    wrapped: torch.nn.Module
    optimizer: torch.optim.Optimizer
    if way.stage:
        wrapped = pypar.Zero(model, stage=way.stage, optimizer=torch.optim.AdamW, lr=1e-4)
        optimizer = wrapped.optimizer
    else:
        wrapped = pypar.DataParallel(model)
        optimizer = torch.optim.AdamW(wrapped.parameters(), lr=1e-4, fused=True)
    for step in range(num_steps):
        if step:
            optimizer.zero_grad()
        tokens = torch.randint(config.vocab_size, (1, TOKENS + 1))
        wrapped(tokens[:, :-1], tokens[:, 1:]).backward()
        optimizer.step()
    return wrapped, optimizer


def rank_memory(rank: int, world_size: int, way: Way, config: GPTConfig) -> tuple[int, float]:
    """(bytes of this rank, shared bytes of the parameters that count to it)"""
    tiny = learn(way, CONFIGS["quick"])  # what the libraries allocate once
    del tiny
    before = settled()
    kept = learn(way, config)
    after = settled()
    flats = getattr(kept[0], "_flats", [])
    mine = sum((flat.layout.shard(rank)[1] - flat.layout.shard(rank)[0]) * flat.dtype.itemsize for flat in flats)
    return after - before, mine


def measure(way: Way, num_ranks: int, config: GPTConfig) -> Row:
    from pypar.testing import run_ranks

    with torch.device("meta"):
        model = GPT(config)
    size = sum(p.nbytes for p in model.parameters())
    unit = max(
        sum(p.nbytes for p in model.blocks[0].parameters()), size - sum(p.nbytes for p in model.blocks.parameters())
    )
    found = run_ranks(rank_memory, num_ranks, way, config, backend=way.backend, limit_s=300)
    return Row(way, num_ranks, size, unit, [each[0] for each in found], sum(each[1] for each in found))


def table(rows: Sequence[Row]) -> str:
    head = ["MB", "ranks", "P", "formula", "measured", "ratio", "", "of the paper", "host", "shards of the host"]
    cells = [head]
    for row in rows:
        cells.append(
            [
                row.way.name,
                str(row.num_ranks),
                *(f"{n / 1e6:.0f}" for n in (row.size, row.formula, row.per_rank)),
                f"{row.ratio:.2f}",
                row.verdict,
                f"{row.paper / 1e6:.0f}",
                f"{sum(row.measured) / 1e6:.0f}",
                f"{row.parameters / 1e6:.0f}" if row.way.stage else "-",
            ]
        )
    return report.aligned(cells)


def write(rows: Sequence[Row], folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{BENCH}.csv"
    columns = ["date", "way", "ranks", "bytes_of_parameters", "bytes_of_a_unit", "formula", "paper", "measured", "host"]
    facts = harness.machine_facts()
    with path.open("w", newline="") as file:
        out = csv.writer(file, lineterminator="\n")
        out.writerow([*columns, *facts])
        for row in rows:
            numbers = (row.formula, row.paper, row.per_rank, sum(row.measured))
            cells = [row.way.name, row.num_ranks, row.size, row.unit, *(round(x) for x in numbers)]
            out.writerow([datetime.date.today().isoformat(), *cells, *facts.values()])
    return path


def chart(rows: Sequence[Row], folder: Path) -> Path:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    counts = sorted({row.num_ranks for row in rows})
    figure, axes = pyplot.subplots(1, len(counts), figsize=(6.5 * len(counts), 5), layout="constrained", sharey=True)
    for axis, n in zip([axes] if len(counts) == 1 else axes, counts, strict=True):
        chosen = [row for row in rows if row.num_ranks == n]
        places = range(len(chosen))
        drawn = axis.bar(places, [row.per_rank / 1e6 for row in chosen], label="measured", color="C0")
        axis.bar_label(drawn, [f"{row.per_rank / 1e6:.0f}" for row in chosen])
        for kind, style in (("formula", "C1"), ("paper", "0.4")):
            values = [getattr(row, kind) / 1e6 for row in chosen]
            label = "formula, a host's parameters once" if kind == "formula" else "formula, parameters on every rank"
            axis.hlines(values, [k - 0.4 for k in places], [k + 0.4 for k in places], color=style, label=label)
        axis.set_xticks(places, [row.way.name for row in chosen], rotation=20)
        axis.set_title(f"{n} ranks on one host, {chosen[0].size / 4e6:.0f} million parameters, AdamW float32")
        axis.grid(True, axis="y", alpha=0.25)
        axis.set_axisbelow(True)
    figure.axes[0].set_ylabel("proportional set size of a rank, MB")
    figure.axes[0].legend()
    return report.save(figure, BENCH, folder)


def main(argv: Sequence[str] | None = None) -> int:
    """1 when a measured size is off by more than a tenth."""
    p = argparse.ArgumentParser(
        prog="python -m bench.bench_zero_memory", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    p.add_argument("--ranks", type=int, nargs="+", default=[2, 4], help="default 2 4")
    p.add_argument("--quick", action="store_true", help="a tiny model: shows that it runs, its ratios say nothing")
    p.add_argument("--results", type=Path, default=harness.RESULTS, help="folder of the rows and the chart")
    args = p.parse_args(argv)
    config, rows = CONFIGS["quick" if args.quick else "full"], []
    for n in args.ranks:
        for way in WAYS:
            print(f"{way.name}, {n} ranks ...", flush=True)
            rows.append(measure(way, n, config))
    print(table(rows))
    print(write(rows, args.results), chart(rows, args.results), sep="\n")
    return 0 if args.quick or all(row.verdict == "PASS" for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
