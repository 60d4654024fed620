"""A rank that does not call: what every rank says of it, and when."""

from __future__ import annotations

import contextlib
import time

import cuda_executor
import pytest
import torch
import torch.distributed as dist

from pypar.testing import run_ranks

pytestmark = pytest.mark.skipif(cuda_executor.COMPILER is None, reason="no g++ on this machine")
OPS = torch.ops.pypar_cuda
WORLD = 3
ABSENT = 2


@pytest.fixture(scope="module", autouse=True)
def compiled():
    cuda_executor.load()


def call_op(
    op: str, rank: int, arguments: tuple, timeout_s: float, report: torch.Tensor, multicast: int = 0
) -> torch.Tensor:
    """Returns what the op would have written to."""
    x, sizes, last = torch.full((129,), float(rank)), [43] * WORLD, (*arguments, timeout_s, report)
    out = torch.full((129,), -77.0)
    shard = torch.full((43,), -77.0)
    if op in ("one_shot", "two_shot"):
        OPS.all_reduce(x, out, "sum", op, *last)
    elif op == "multimem":
        OPS.all_reduce(x, out, "sum", op, *last, multicast=multicast)
    elif op == "reduce_scatter":
        OPS.reduce_scatter(x, shard, sizes, "sum", *last)
    elif op == "all_gather":
        OPS.all_gather(x[:43].clone(), out, sizes, *last)
    elif op == "all_gather_copied":
        OPS.all_gather_copied(x[:43].clone(), out, sizes, arguments[0].tolist(), *last)
    elif op == "zero_scatter":
        OPS.zero_scatter(shard, x, sizes, 1.0, False, *last)
    else:
        moments, adamw = (torch.zeros(43), torch.zeros(43)), (1, 1e-2, 0.9, 0.99, 1e-8, 0.1, 1.0, True, False)
        OPS.zero_step(shard, x, *moments, None, None, None, sizes, *adamw, *last)
    return torch.cat([out, shard])


def absent(rank: int, world: int, op: str, calls_before: int) -> tuple[str, str, list[int], float]:
    cuda_executor.load()
    channel, arguments = cuda_executor.channel(dist.group.WORLD, op, 1 << 14)
    report, multicast = torch.zeros(4, dtype=torch.int32), cuda_executor.multicast(channel)
    for _ in range(calls_before):
        call_op(op, rank, arguments, 30.0, report, multicast)
    dist.barrier()
    begin, said, checked = time.monotonic(), "", ""
    if rank != ABSENT:
        try:
            # Rank 1 would wait for a minute; rank 0 tells it.
            call_op(op, rank, arguments, 0.4 if rank == 0 else 60.0, report, multicast)
        except RuntimeError as error:
            said = str(error).split("\n")[0]
    taken = time.monotonic() - begin
    dist.barrier()
    try:
        channel.check()
    except RuntimeError as error:
        checked = str(error)
    return said, checked, report.tolist(), taken


@pytest.mark.parametrize("calls_before", [0, 3])
@pytest.mark.parametrize(
    "op",
    [
        "one_shot",
        "two_shot",
        "multimem",
        "reduce_scatter",
        "all_gather",
        "all_gather_copied",
        "zero_scatter",
        "zero_step",
    ],
)
def test_every_rank_names_the_one_that_does_not_call(op, calls_before):
    first, told, culprit = run_ranks(absent, WORLD, op, calls_before)
    call = calls_before + 1
    for said, _, _, taken in (first, told):
        assert "the kernel ended in a trap" in said
        assert 0.3 < taken < 10
    assert f"{op}, call {call}: rank 0 waited for the data of rank 2" in first[1]
    assert first[2][:2] == [1, ABSENT] and first[2][3] == call
    assert f"{op}, call {call}: rank 1 stopped with the others, who waited for rank 2" in told[1]
    assert told[2][:2] == [3, ABSENT]
    assert f"{op}, call {call}: rank 2 stopped with the others" in culprit[1]
    assert culprit[2] == [0, 0, 0, 0]


def unread_slot(rank: int, world: int) -> tuple[str, bool]:
    """Rank 0's call 3 while rank 1 seems not to have read what rank 0 wrote for call 1, whose slot call 3 takes."""
    cuda_executor.load()
    channel, arguments = cuda_executor.channel(dist.group.WORLD, "gate", 1 << 14)
    report = torch.zeros(4, dtype=torch.int32)
    for _ in range(2):
        call_op("two_shot", rank, arguments, 30.0, report)
    dist.barrier()
    if rank == 0:
        channel.memory.view(torch.int32)[16 + 2 * world * 256 + 1 * world + 1] = 0
        out = torch.full((129,), -77.0)
        with contextlib.suppress(RuntimeError):
            OPS.all_reduce(torch.ones(129), out, "sum", "two_shot", *arguments, 0.3, report)
        try:
            channel.check()
        except RuntimeError as error:
            return str(error), bool((out == -77).all())
    return "", True


def test_a_slot_that_was_not_read_is_not_written():
    said, untouched = run_ranks(unread_slot, WORLD)[0]
    assert "gate, call 3: rank 0 waited for an empty slot of rank 1" in said
    assert untouched
