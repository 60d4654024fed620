"""Runs in every rank: verifies each program against torch, then times its variants in turn."""

from __future__ import annotations

import statistics
from typing import Any

import torch
import torch.distributed as dist

from bench.gpu.limits import Reached, measure, median_seconds, seconds
from bench.gpu.programs import Program, programs


def _agrees(program: Program) -> str:
    """Whether every variant's result is that of torch, "" or what differs. What works in place has its own tests."""
    results = {name: run() for name, run in program.variants.items()}
    want = results["torch"]
    if not isinstance(want, torch.Tensor):
        return ""
    for name, got in results.items():
        got = got[0] if isinstance(got, (list, tuple)) else got
        if not isinstance(got, torch.Tensor):
            continue
        try:
            torch.testing.assert_close(got.float(), want.float(), rtol=3e-2, atol=3e-2)
        except AssertionError as error:
            return f"{name}: {str(error).splitlines()[0]}"
    return ""


def least_seconds(program: Program, reached: Reached) -> float:
    """What no implementation can beat: the longest of computing, reading memory and moving to peers."""
    return max(
        program.flops / reached.flops[program.dtype],
        program.memory_bytes / reached.memory_bytes,
        program.peer_bytes / reached.peer_bytes,
    )


def rows(rank: int, world: int, executor_name: str, is_small: bool, rounds: int) -> dict[str, Any]:
    from kernels.executors import EXECUTORS

    executor = EXECUTORS[executor_name]
    if executor.device == "cuda":
        torch.cuda.set_device(rank)
    torch.manual_seed(rank)
    reached = measure(executor.device, is_small)
    made = []
    for program in programs(executor.find, executor.ops, executor.device, is_small):
        wrong = _agrees(program)
        wrongs: list[str | None] = [None] * world
        dist.all_gather_object(wrongs, wrong)
        row: dict[str, Any] = {"op": program.op, "size": program.size, "dtype": program.dtype}
        if any(wrongs):
            made.append({**row, "variant": "pypar", "us": None, "refused": next(w for w in wrongs if w)})
            continue
        least = least_seconds(program, reached)
        once = max(median_seconds(run, executor.device, 1, 1) for run in program.variants.values())
        counts: list[Any] = [None] * world
        dist.all_gather_object(counts, max(1, min(200, int(2e-2 / once))))  # as many on every rank
        taken: dict[str, list[float]] = {name: [] for name in program.variants}
        for _ in range(rounds):
            for name, run in program.variants.items():
                dist.barrier()
                taken[name].append(seconds(run, executor.device, min(counts)))
        for name, samples in taken.items():
            us = 1e6 * statistics.median(samples)
            made.append({**row, "variant": name, "us": us, "least_us": 1e6 * least, "share": 1e6 * least / us})
    return {"rows": made, "reached": reached}
