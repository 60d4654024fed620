"""One suite for every executor: the bits of plain torch, the same on all ranks and in every run, with pauses."""

from __future__ import annotations

import os
import random
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist
from kernels.cases import CASES, GROUP, results_of
from kernels.executors import EXECUTORS

from pypar.testing import run_ranks

# Factors found in another order; exponentials.
ROUNDED = ("zero_step", "vocab_cross_entropy", "linear_vocab_cross_entropy")
FULL = os.environ.get("PYPAR_KERNELS_FULL") == "1"  # make kernels-full
ROUNDS = 20 if FULL else 2
SIZES = {"zero_step": (1, 129, 4099)}
DTYPES = {op: (torch.float32, torch.bfloat16, torch.float16) for op in CASES} | {"zero_step": (torch.float32,)}
CELLS = [(name, op) for name, executor in EXECUTORS.items() for op in executor.ops if op in CASES]


def sizes_for(op: str, world: int) -> tuple[int, ...]:
    """Of the dim that is cut: none, fewer than ranks, about as many, odd ones; 48 rows and more are fused."""
    if op in SIZES:
        return SIZES[op]
    if "matmul" in op or "vocab" in op:
        return (0, 1, world + 1, 67, 130)
    return (0, 1, world - 1, world, world + 1, 127, 129, 4099)


def tolerance(op: str, dtype: torch.dtype) -> dict[str, float]:
    """Sums of gradients in half types, whose terms are below one: next to a tie an exponential decides."""
    if op == "linear_vocab_cross_entropy":
        eps = max(1e-6, torch.finfo(dtype).eps)
        return {"rtol": 2 * eps, "atol": eps}
    return {"rtol": 1e-6, "atol": 1e-7} if op in ROUNDED else {"rtol": 0, "atol": 0}


def moved(arguments: list[Any], device: str) -> list[Any]:
    if isinstance(arguments, torch.Tensor):
        return arguments.to(device)
    return [moved(a, device) for a in arguments] if isinstance(arguments, list) else arguments


def run_cases(rank: int, world: int, name: str, op: str, rounds: int) -> list[torch.Tensor]:
    """Checks every size and type against plain torch, with a pause here and there; the results, for other ranks'."""
    executor = EXECUTORS[name]
    function, group_name = executor.find(op), dist.group.WORLD.group_name
    pause = random.Random(17 * rank + 3)
    made = []
    for seed in range(rounds):
        for size in sizes_for(op, world):
            for dtype in DTYPES[op]:
                arguments, expected = CASES[op](size, dtype, rank, world, seed + 1)
                arguments = moved([group_name if a is GROUP else a for a in arguments], executor.device)
                if pause.random() < 0.2:
                    time.sleep(pause.random() * 0.005)
                results = results_of(op, function(*arguments), arguments)
                for result, want in zip(results, expected, strict=True):
                    torch.testing.assert_close(result.cpu(), want, **tolerance(op, dtype))
                    made.append(result.cpu())
    return made


def needs(name: str, world: int) -> None:
    why = EXECUTORS[name].lacks(world)
    if why:
        pytest.skip(f"{name}: {why}")


@pytest.mark.parametrize("world", [2, pytest.param(3, marks=pytest.mark.slow), *([4] if FULL else [])])
@pytest.mark.parametrize(("name", "op"), CELLS, ids=[f"{name}-{op}" for name, op in CELLS])
def test_bits_of_plain_torch(name, op, world, monkeypatch):
    needs(name, world)
    for key, value in EXECUTORS[name].environment:
        monkeypatch.setenv(key, value)
    results = run_ranks(run_cases, world, name, op, ROUNDS, backend=EXECUTORS[name].backend, limit_s=280)
    if op in ("all_reduce", "matmul_all_reduce"):
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True)), "ranks hold other bits"
