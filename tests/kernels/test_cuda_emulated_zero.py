"""The ZeRO ops of csrc/cuda, executed on CPU: the bits of the compiled CPU ops and of the reference."""

from __future__ import annotations

import itertools

import cuda_executor
import pytest
import torch
import torch.distributed as dist
from test_cuda_emulated_collectives import payload, shifted

from pypar import backend
from pypar.reference.zero_step import zero_step as reference_step
from pypar.testing import run_ranks

pytestmark = pytest.mark.skipif(cuda_executor.COMPILER is None, reason="no g++ on this machine")
OPS = torch.ops.pypar_cuda
SLOT_BYTES = 1 << 18
TIMEOUT_S = 30.0
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(scope="module", autouse=True)
def compiled():
    cuda_executor.load()


def uneven(numel: int, world: int, call: int) -> list[int]:
    """Shards of any sizes, none for some rank in every other call."""
    cuts = torch.randint(0, numel + 1, (world - 1,), generator=torch.Generator().manual_seed(call)).sort().values
    edges = [0, *cuts.tolist(), numel]
    return [b - a for a, b in itertools.pairwise(edges)]


def summed(parts: list[torch.Tensor], begin: int, num: int) -> torch.Tensor:
    total = parts[0][begin : begin + num].float()
    for part in parts[1:]:
        total = total + part[begin : begin + num].float()
    return total


def gathers(rank: int, world: int) -> list[str]:
    """By a kernel, and by copies into the slot where the parameters are used, several units ahead."""
    cuda_executor.load()
    wrong = []
    _, kernel = cuda_executor.channel(dist.group.WORLD, "gather", SLOT_BYTES)
    units = [cuda_executor.channel(dist.group.WORLD, f"unit {i}", SLOT_BYTES) for i in range(3)]
    pending: list[tuple[int, torch.Tensor]] = []

    def use() -> None:
        unit, expected = pending.pop(0)
        channel, arguments = units[unit]
        OPS.zero_gather_wait(*arguments, TIMEOUT_S)
        slots = channel.memory.numel() - 2 * channel.slot_bytes
        full = channel.memory[slots : slots + expected.nbytes].view(expected.dtype)
        if not torch.equal(full, expected):
            wrong.append(f"unit {unit} of {expected.numel()} {expected.dtype}")
        OPS.zero_gather_free(*arguments)

    for call in range(24):
        numel = (0, 1, 17, 129, 4099, 1000)[call % 6]
        dtype = (*DTYPES, torch.uint8)[call // 6]
        full, sizes = payload(call, numel, dtype, True), uneven(numel, world, call)
        shard = full[sum(sizes[:rank]) :][: sizes[rank]].clone()
        got = torch.zeros_like(full)
        OPS.zero_gather(got, shard, sizes, *kernel, TIMEOUT_S)
        if not torch.equal(got, full):
            wrong.append(f"kernel, call {call}")
        channel, arguments = units[call % 3]
        OPS.zero_gather_start(shard, sizes, channel.pointers.tolist(), *arguments, TIMEOUT_S)
        pending.append((call % 3, full))
        if len(pending) == 2:
            use()
    while pending:
        use()
    return wrong


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("stalls", ["", "3:300"])
def test_gather(world, stalls, monkeypatch):
    monkeypatch.setenv("PYPAR_EMULATION_STALLS", stalls)
    assert run_ranks(gathers, world) == [[]] * world


def scatters(rank: int, world: int) -> list[str]:
    cuda_executor.load()
    wrong = []
    _, arguments = cuda_executor.channel(dist.group.WORLD, "scatter", SLOT_BYTES)
    for call in range(30):
        numel, dtype, accumulate = (0, 1, world, 129, 4099)[call % 5], DTYPES[call % 3], call % 2 == 1
        parts = [payload(100 * call + r, numel, dtype, False) for r in range(world)]
        sizes = uneven(numel, world, call)
        before = payload(call, sizes[rank], torch.float32, False)
        shard, scale = before.clone(), 0.37
        squares = OPS.zero_scatter(shard, parts[rank], sizes, scale, accumulate, *arguments, TIMEOUT_S)
        total = summed(parts, sum(sizes[:rank]), sizes[rank]) * scale
        expected = total + before if accumulate else total
        if not torch.equal(shard, expected):
            wrong.append(f"shard of call {call}")
        if not torch.isclose(squares, expected.double().square().sum(), rtol=1e-12, atol=0):
            wrong.append(f"squares of call {call}: {squares}")
        if backend.extension is not None:  # the compiled CPU op, on the same numbers
            again = before.clone()
            torch.ops.pypar.zero_scatter(again, parts[rank], sizes, scale, accumulate, dist.group.WORLD.group_name)
            if not torch.equal(shard, again):
                wrong.append(f"call {call} differs from csrc/cpu")
    return wrong


@pytest.mark.parametrize("world", [2, 3, 4])
def test_scatter(world):
    assert run_ranks(scatters, world) == [[]] * world


def steps(rank: int, world: int) -> list[str]:
    """Several steps of AdamW and Adam on gradients that are summed in the same pass."""
    cuda_executor.load()
    wrong = []
    _, arguments = cuda_executor.channel(dist.group.WORLD, "step", SLOT_BYTES)
    for case in range(12):
        numel, dtype = (1, 129, 1003, 4099)[case % 4], DTYPES[case % 3]
        decoupled, amsgrad, maximize = case % 2 == 0, case // 2 % 2 == 0, case // 4 % 2 == 0
        with_low, with_clip = case % 5 != 0, case % 4 != 1
        sizes = uneven(numel, world, case)
        n, begin = sizes[rank], sum(sizes[:rank])
        place = shifted if case % 4 == 3 else torch.clone
        state = [place(payload(case, n, torch.float32, False)), *(place(torch.zeros(n)) for _ in range(3))]
        low = place(torch.zeros(n, dtype=dtype)) if with_low else None
        clip = torch.tensor([0.71]) if with_clip else None
        param, exp_avg, exp_avg_sq, v_max = state
        wanted = [x.clone() for x in state]
        compiled = [x.clone() for x in state]
        for step in range(1, 4):
            parts = [payload(1000 * case + 10 * step + r, numel, dtype, False) for r in range(world)]
            factors = (step, 1e-2, 0.9, 0.99, 1e-8, 0.1)
            OPS.zero_step(
                param,
                parts[rank],
                exp_avg,
                exp_avg_sq,
                v_max if amsgrad else None,
                low,
                clip,
                sizes,
                *factors,
                0.25,
                decoupled,
                maximize,
                *arguments,
                TIMEOUT_S,
            )
            grad = summed(parts, begin, n)
            scale = float(torch.tensor(0.25) * clip) if with_clip else 0.25
            step_on(reference_step, wanted, grad, amsgrad, factors, scale, decoupled, maximize)
            if backend.extension is not None:
                step_on(torch.ops.pypar.zero_step, compiled, grad, amsgrad, factors, scale, decoupled, maximize)
        for name, got, expected, exact in zip(("param", "m", "v", "v_max"), state, wanted, compiled, strict=True):
            if not torch.allclose(got, expected, rtol=1e-5, atol=1e-6):
                wrong.append(f"case {case}: {name}")
            if backend.extension is not None and not torch.equal(got, exact):
                wrong.append(f"case {case}: {name} differs from csrc/cpu")
        if low is not None and not torch.equal(low, param.to(dtype)):
            wrong.append(f"case {case}: low")
    return wrong


def step_on(op, state, grad, amsgrad, factors, scale, decoupled, maximize):
    param, exp_avg, exp_avg_sq, v_max = state
    op(param, grad, exp_avg, exp_avg_sq, v_max if amsgrad else None, None, *factors, scale, decoupled, maximize)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_step(world):
    assert run_ranks(steps, world) == [[]] * world
