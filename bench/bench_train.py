"""A training step on 2 ranks with one thread each: DataParallel and torch's DDP against no communication at all.

python bench/bench_train.py [--quick] [--model small|large] [--variants none ddp-gloo ddp-pypar dp-pypar]

efficiency = time of the same compute and optimizer without communication / time of the step, both in this run: the
variants take turns, step by step. Before anything is timed, the gradients of all variants are compared.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from models import CONFIGS, GPT
from torch.nn.parallel import DistributedDataParallel

import pypar
from pypar import backend
from pypar.testing import run_ranks

VARIANTS = ("none", "ddp-gloo", "ddp-pypar", "dp-gloo", "dp-gloo-copy", "dp-pypar", "dp-pypar-copy")
DEFAULT_VARIANTS = ("none", "ddp-gloo", "ddp-pypar", "dp-pypar")
BATCH = {"tiny": 2, "small": 2, "large": 1}  # per rank


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few steps of a tiny model: does it run, is it right")
    parser.add_argument("--model", choices=sorted(CONFIGS), default="small")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(DEFAULT_VARIANTS))
    parser.add_argument("--steps", type=int, default=20, help="timed steps of each variant (default 20)")
    parser.add_argument("--warmup", type=int, default=3, help="steps of each variant before that (default 3)")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--bucket-mb", type=float, default=25)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "bench_train.csv")
    args = parser.parse_args()
    if args.quick:
        args.model, args.steps, args.warmup = "tiny", 5, 2
    variants = list(dict.fromkeys(["none", *args.variants]))
    if not backend.available():
        print("the compiled extension is absent: without the pypar variants")
        variants = [v for v in variants if v.split("-")[1:2] != ["pypar"]]
    job = (args.model, variants, args.warmup, args.steps, args.bucket_mb)
    times = run_ranks(measure, args.ranks, *job, backend="gloo", timeout_s=300, limit_s=3600)
    report(args, variants, times)


def build(variant: str, model: str, bucket_mb: float) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    module: torch.nn.Module = GPT(CONFIGS[model])
    kind, group = variant.split("-")[0], None
    if kind != "none":
        group = dist.new_group(backend=variant.split("-")[1])
    if kind == "ddp":
        module = DistributedDataParallel(module, process_group=group, bucket_cap_mb=bucket_mb)
    elif kind == "dp":
        fuse = not variant.endswith("-copy")
        module = pypar.DataParallel(module, group, bucket_size_mb=bucket_mb, fuse_linear_grads=fuse)
    return module, torch.optim.AdamW(module.parameters(), lr=1e-4, fused=True)


def measure(rank: int, world_size: int, model: str, variants: list[str], warmup: int, steps: int, bucket_mb: float):
    """{variant: seconds per step} of this rank; AssertionError where a variant computes something else."""
    config, batch = CONFIGS[model], BATCH[model]
    torch.manual_seed(100)
    data = torch.randint(config.vocab_size, (world_size * batch, config.seq_len + 1))
    share = data[rank * batch : (rank + 1) * batch]
    built: dict[str, Any] = {variant: build(variant, model, bucket_mb) for variant in variants}
    verify(built, data, share)

    def step(variant: str) -> float:
        module, optimizer = built[variant]
        dist.barrier()
        start = time.perf_counter()
        module(share[:, :-1], share[:, 1:]).backward()
        optimizer.step()
        optimizer.zero_grad()
        return time.perf_counter() - start

    for _ in range(warmup):
        for variant in variants:
            step(variant)
    times: dict[str, list[float]] = {variant: [] for variant in variants}
    for _ in range(steps):
        for variant in variants:
            times[variant].append(step(variant))
    return times


def verify(built: dict[str, Any], data: torch.Tensor, share: torch.Tensor) -> None:
    """Loss and every gradient of every variant against one process that sees the whole batch."""
    world_size, batch = data.shape[0] // share.shape[0], share.shape[0]
    whole, _ = built["none"]
    expected = whole(data[:, :-1], data[:, 1:])
    expected.backward()
    for variant, (module, _) in built.items():
        if variant == "none":
            continue
        loss = module(share[:, :-1], share[:, 1:])
        loss.backward()
        total = loss.detach().clone()
        dist.all_reduce(total)
        torch.testing.assert_close(total / world_size, expected.detach(), rtol=1e-5, atol=1e-6, msg=variant)
        for (name, ours), theirs in zip(module.module.named_parameters(), whole.parameters(), strict=True):
            torch.testing.assert_close(
                ours.grad, theirs.grad, rtol=1e-4, atol=1e-6, msg=lambda m, v=variant, n=name: f"{v}: {n}: {m}"
            )
        module.zero_grad()
    whole.zero_grad()
    assert batch * world_size == data.shape[0]


def report(args: argparse.Namespace, variants: list[str], times: list[dict[str, list[float]]]) -> None:
    """Prints the table and appends a CSV row for each variant. A step takes as long as its slowest rank."""
    slowest = {v: [max(ranks) for ranks in zip(*(t[v] for t in times), strict=True)] for v in variants}
    none = statistics.median(slowest["none"])
    print(f"{args.model}, {args.ranks} ranks, {args.steps} steps\nvariant          median ms   p20   p80   efficiency")
    rows = []
    for variant in variants:
        ms = sorted(1e3 * t for t in slowest[variant])
        median, p20, p80 = statistics.median(ms), ms[len(ms) // 5], ms[len(ms) * 4 // 5]
        # Of the ratios of neighbouring steps: what slows the machine down slows both.
        ratio = statistics.median(a / b for a, b in zip(slowest["none"], slowest[variant], strict=True))
        print(f"{variant:16} {median:9.1f} {p20:6.0f} {p80:6.0f} {100 * ratio:9.1f} %")
        rows.append(
            {
                "bench": "train", "model": args.model, "variant": variant, "ranks": args.ranks, "steps": args.steps,
                "bucket_mb": args.bucket_mb, "median_ms": round(median, 2), "p20_ms": round(p20, 2),
                "p80_ms": round(p80, 2), "efficiency": round(ratio, 4), "none_ms": round(1e3 * none, 2),
                "machine": platform.processor() or platform.machine(), "torch": torch.__version__,
                "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M"),
            }
        )  # fmt: skip
    args.out.parent.mkdir(parents=True, exist_ok=True)
    new = not args.out.exists()
    with args.out.open("a", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        if new:
            writer.writeheader()
        writer.writerows(rows)
    print(f"rows appended to {args.out.name}")


if __name__ == "__main__":
    main()
