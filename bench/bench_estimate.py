"""Memory of every rank, measured and as pypar.estimate says before the run: python -m bench.bench_estimate.

A Llama of 25 million parameters (8 layers, hidden size 512) learns under twelve plans of 4 ranks on one host, with
AdamW, for four steps. Measured over the last two is the most memory that a rank takes, less what it took before the
model was built. Private memory: the kernel's high-water mark (VmHWM, reset before those steps). Memory that ranks
share: the proportional set size of its pages (Pss_Shmem of /proc/self/smaps_rollup: a page that n processes map counts
1/n to each). glibc gives back freed memory above 64 KiB at once here (mallopt), so that what is measured is what is in
use; --plain-malloc leaves that out: what glibc keeps then comes on top.

A plan passes where all of its ranks together are within 10 % of the estimate; `worst` is the rank that is off the most.
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
from typing import Any

import torch
import torch.distributed as dist

from bench import harness, report

BENCH = "bench_estimate"
WITHIN = 0.10
PLANS = (
    "dp=4",
    "tp=4",
    "tp=4 sequence_parallel=true loss_parallel=true",
    "pp=4 micro_batches=8",
    "pp=4 schedule=zbv micro_batches=8",
    "dp=4 zero=1",
    "dp=4 zero=2 micro_batches=2",
    "dp=4 zero=3",
    "dp=2 tp=2 zero=1 recompute=true",
    "pp=2 tp=2 micro_batches=4 schedule=gpipe",
    "pp=2 dp=2 zero=2 micro_batches=4",
    "pp=2 dp=2 zero=3 micro_batches=4 precision=bfloat16",
)
SIZES: dict[str, dict[str, int]] = {
    "full": {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 8, "vocab_size": 2048},
    "quick": {"hidden_size": 64, "intermediate_size": 172, "num_hidden_layers": 8, "vocab_size": 97},
}
BATCH = {"full": (8, 256), "quick": (8, 32)}
M_MMAP_THRESHOLD, M_TRIM_THRESHOLD = -3, -1  # of mallopt(3)


def make_model(size: str) -> Any:
    import transformers

    torch.manual_seed(0)
    config: Any = transformers.LlamaConfig(
        **SIZES[size], num_attention_heads=8, num_key_value_heads=4, max_position_embeddings=512, use_cache=False
    )
    return transformers.LlamaForCausalLM(config)


def field(file: str, name: str) -> int:
    """Bytes of a line of /proc/self/<file>."""
    found = re.search(rf"^{name}:\s+(\d+) kB", Path("/proc/self", file).read_text(), re.MULTILINE)
    assert found is not None, (file, name)
    return 1024 * int(found[1])


def settle() -> None:
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    dist.barrier()


def private() -> int:
    return field("status", "RssAnon")


def learn(plan: str, size: str, peak: bool) -> tuple[int, Any]:
    """(the most private bytes of the last two steps, what must stay)"""
    import pypar

    model, optimizer = pypar.parallelize(make_model(size), pypar.Plan.parse(plan), torch.optim.AdamW, lr=1e-4)
    settle()
    for step in range(4):
        if peak and step == 2:
            settle()
            Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
        samples, tokens = BATCH[size]
        ids = torch.randint(SIZES[size]["vocab_size"], (samples, tokens), generator=torch.Generator().manual_seed(step))
        model.train_step(model.local_batch({"input_ids": ids, "labels": ids}))
        optimizer.step()
        optimizer.zero_grad()
    most = field("status", "VmHWM") - field("status", "RssShmem") - field("status", "RssFile")
    return most, (model, optimizer)


def rank_memory(rank: int, world_size: int, plan: str, size: str, plain_malloc: bool) -> int:
    if not plain_malloc:
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_THRESHOLD, 65536)
        libc.mallopt(M_TRIM_THRESHOLD, 65536)
    kept = learn(plan, "quick", False)  # what the libraries allocate once
    del kept
    settle()
    before, shared = private(), field("smaps_rollup", "Pss_Shmem")
    dist.barrier()
    most, _kept = learn(plan, size, True)
    dist.barrier()
    now = field("smaps_rollup", "Pss_Shmem")
    dist.barrier()
    return most - before + now - shared


@dataclass
class Row:
    plan: str
    estimated: list[int]  # bytes by rank
    measured: list[int]

    @property
    def ratio(self) -> float:
        return sum(self.measured) / sum(self.estimated)

    @property
    def worst(self) -> float:
        return max((m / e for m, e in zip(self.measured, self.estimated, strict=True)), key=lambda r: abs(r - 1))

    @property
    def verdict(self) -> str:
        return "PASS" if abs(self.ratio - 1) <= WITHIN else "MISS"


def measure(plan: str, size: str, plain_malloc: bool) -> tuple[Row, Any]:
    import pypar
    from pypar.testing import run_ranks

    with torch.device("meta"):
        model = make_model(size)
    found = pypar.estimate(model, plan, BATCH[size])
    measured = run_ranks(rank_memory, 4, plan, size, plain_malloc, limit_s=300, timeout_s=120)
    return Row(plan, [rank.memory_bytes for rank in found.ranks], measured), found


def table(rows: Sequence[Row]) -> str:
    cells = [["plan", "estimated MB by rank", "measured", "ratio", "worst", ""]]
    for row in rows:
        said, seen = (" ".join(f"{n / 1e6:.0f}" for n in each) for each in (row.estimated, row.measured))
        cells.append([row.plan, said, seen, f"{row.ratio:.2f}", f"{row.worst:.2f}", row.verdict])
    return report.aligned(cells)


def write(rows: Sequence[Row], folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{BENCH}.csv"
    facts = harness.machine_facts()
    with path.open("w", newline="") as file:
        out = csv.writer(file, lineterminator="\n")
        out.writerow(["date", "plan", "rank", "estimated_bytes", "measured_bytes", *facts])
        for row in rows:
            for rank, (said, seen) in enumerate(zip(row.estimated, row.measured, strict=True)):
                out.writerow([datetime.date.today().isoformat(), row.plan, rank, said, seen, *facts.values()])
    return path


def main(argv: Sequence[str] | None = None) -> int:
    """1 when a plan is off by more than a tenth."""
    p = argparse.ArgumentParser(
        prog="python -m bench.bench_estimate", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    p.add_argument("--plans", nargs="+", default=list(PLANS), help="of 4 ranks")
    p.add_argument("--quick", action="store_true", help="a tiny model: shows that it runs, its ratios say nothing")
    p.add_argument("--plain-malloc", action="store_true", help="glibc as it is")
    p.add_argument("--kinds", action="store_true", help="print the estimate by kind as well")
    p.add_argument("--results", type=Path, default=harness.RESULTS, help="folder of the rows")
    args = p.parse_args(argv)
    rows = []
    for plan in args.plans:
        row, found = measure(plan, "quick" if args.quick else "full", args.plain_malloc)
        rows.append(row)
        print(f"{plan}: {row.ratio:.2f}" + (f"\n{found}\n" if args.kinds else ""), flush=True)
    print(table(rows), write(rows, args.results), sep="\n")
    return 0 if args.quick or all(row.verdict == "PASS" for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
