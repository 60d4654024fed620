"""Runs in every rank: verifies each program against torch, then times its variants in turn."""

from __future__ import annotations

import json
import statistics
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from bench.gpu.limits import Reached, measure, median_seconds, seconds
from bench.gpu.peers import Make, Run
from bench.gpu.programs import Program, programs


def _differs(got: Any, want: torch.Tensor) -> str:
    got = got[0] if isinstance(got, (list, tuple)) else got
    if not isinstance(got, torch.Tensor):
        return ""
    try:
        torch.testing.assert_close(got.float(), want.float(), rtol=3e-2, atol=3e-2)
    except AssertionError as error:
        return str(error).splitlines()[0]
    return ""


def _agrees(program: Program) -> str:
    """Whether every variant's result is that of torch, "" or what differs. What works in place has its own tests."""
    results = {name: run() for name, run in program.variants.items()}
    want = results["torch"]
    if not isinstance(want, torch.Tensor):
        return ""
    wrong = {name: _differs(got, want) for name, got in results.items()}
    return next((f"{name}: {why}" for name, why in wrong.items() if why), "")


def _everywhere(step: Callable[[], Any]) -> tuple[Any, str]:
    """What a step gives here, and "" or why it failed on the first rank where it did. A call of all ranks, so that none
    goes on without the others."""
    result, why = None, ""
    try:
        result = step()
    except Exception as error:
        why = (str(error).strip() or type(error).__name__).splitlines()[0]
    whys: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(whys, why)
    return result, next((w for w in whys if w), "")


def _join(make: Make, program: Program, stack: ExitStack) -> tuple[Run | None, str]:
    """A peer that is ready and gives what torch gives, or why not."""
    own = ExitStack()
    stack.push(_closing(own))
    run, why = _everywhere(lambda: own.enter_context(make()))
    if why:
        return None, why
    got, why = _everywhere(lambda: run())
    if why:
        return None, why
    want = program.variants["torch"]()  # when all have run the peer: both communicate
    _, why = _everywhere(lambda: _refuse(_differs(got, want)))
    return (None, why) if why else (run, "")


def _refuse(why: str) -> None:
    if why:
        raise ValueError(why)


def _closing(stack: ExitStack) -> Callable[..., None]:
    """A peer that can't be put away must not take the times of the others with it."""

    def close(*_: Any) -> None:
        try:
            stack.close()
        except Exception as error:
            warnings.warn(f"a peer was not put away: {error}", stacklevel=1)

    return close


def least_seconds(program: Program, reached: Reached) -> float:
    """What no implementation can beat: the longest of computing, reading memory and moving to peers."""
    return max(
        program.flops / reached.flops[program.dtype],
        program.memory_bytes / reached.memory_bytes,
        program.peer_bytes / reached.peer_bytes,
    )


def _timed(program: Program, reached: Reached, device: str, rounds: int) -> list[dict[str, Any]]:
    """A row for each variant, of those that can't run with the reason."""
    row: dict[str, Any] = {"op": program.op, "size": program.size, "dtype": program.dtype}
    _, why = _everywhere(lambda: _refuse(_agrees(program)))
    if why:
        return [{**row, "variant": "pypar", "us": None, "refused": why}]
    made, variants = [], dict(program.variants)
    with ExitStack() as stack:
        for name, make in program.peers.items():
            run, why = _join(make, program, stack)
            if run is None:
                made.append({**row, "variant": name, "us": None, "refused": why})
            else:
                variants[name] = run
        least = least_seconds(program, reached)
        once = max(median_seconds(run, device, 1, 1) for run in variants.values())
        counts: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(counts, max(1, min(200, int(2e-2 / once))))  # as many on every rank
        taken: dict[str, list[float]] = {name: [] for name in variants}
        for _ in range(rounds):
            for name, run in variants.items():
                dist.barrier()
                taken[name].append(seconds(run, device, min(counts)))
    times = {name: 1e6 * statistics.median(samples) for name, samples in taken.items()}
    timed = [
        {**row, "variant": name, "us": us, "least_us": 1e6 * least, "share": 1e6 * least / us}
        for name, us in times.items()
    ]
    return timed + made


def rows(rank: int, world: int, executor_name: str, is_small: bool, rounds: int, folder: str) -> None:
    """Rank 0 writes what there is after each program into `folder`/times.json, which stays if a later one ends all."""
    from kernels.executors import EXECUTORS

    executor = EXECUTORS[executor_name]
    if executor.device == "cuda":
        torch.cuda.set_device(rank)
    torch.manual_seed(rank)
    reached = measure(executor.device, is_small)
    made: list[dict[str, Any]] = []
    for program in programs(executor.find, executor.ops, executor.device, is_small):
        made += _timed(program, reached, executor.device, rounds)
        if rank == 0:
            (Path(folder) / "times.json").write_text(json.dumps({"reached": asdict(reached), "rows": made}))
