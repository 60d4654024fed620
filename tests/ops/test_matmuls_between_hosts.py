"""The fused matmuls over ranks that share no memory, in chunks. PYPAR_NODE_ID makes several "hosts" of this machine."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from ops.collective_cases import name, same_bits
from ops.matmul_cases import FLOATS, close, matrix, rows_of, share

import pypar
from pypar import backend
from pypar.reference.all_gather_matmul import all_gather_matmul as gather_reference
from pypar.reference.collectives import rows_per_rank
from pypar.reference.matmul_all_reduce import matmul_all_reduce as reduce_reference
from pypar.reference.matmul_reduce_scatter import matmul_reduce_scatter as scatter_reference
from pypar.testing import run_ranks

pytestmark = pytest.mark.skipif(not backend.available(), reason="needs the compiled extension")

# (M, K, N): no rows, one, fewer than ranks, odd, chunks that are a multiple of 16 rows and longer than 32 KiB.
SHAPES = [(0, 5, 7), (1, 3, 2), (3, 8, 8), (13, 17, 9), (129, 33, 65), (601, 65, 33)]
CHUNKS = [1, 2, 5, 40]
NODES = ["ab", "aabb", "abab", "aab", "abc"]
ops = torch.ops.pypar


def start(rank: int, world: int, folder: str, nodes: str) -> None:
    os.environ["PYPAR_NODE_ID"] = nodes[rank]
    store = dist.FileStore(f"{folder}/store", world)
    dist.init_process_group("pypar", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=60))
    pypar.calibrate(calibration=FIXED)


FIXED = pypar.Calibration(
    latency_s=1e-4,
    bytes_per_s=1e9,
    chunk_s=1e-4,
    wire_cpu=0,
    float32_flops=1e11,
    float64_flops=5e10,
    bfloat16_flops=1e11,
    float16_flops=1e10,
)


def check_gather(rank: int, world: int) -> None:
    for seed, (M, K, N) in enumerate(SHAPES):
        counts = rows_of(M, world)
        for dtype in FLOATS if M < 600 else FLOATS[:1]:
            full = matrix(seed, M, K, dtype, integers=True)
            x = full.split(counts)[rank]
            weights = [matrix(90 + i + rank, N + i, K, dtype, integers=True) for i in range(2)]
            biases = [matrix(7, 1, N, dtype, integers=True)[0], None]
            dys = [matrix(20 + i + rank, M, N + i, dtype, integers=True) for i in range(2)]
            expected = gather_reference(x, weights, biases, counts, name())
            for chunks in CHUNKS:
                ys = ops.all_gather_matmul(x, weights, biases, counts, name(), num_chunks=chunks)
                dws = ops.all_gather_matmul_dw(x, dys, counts, name(), num_chunks=chunks)
                w = matrix(5 + rank, K, N, dtype, integers=True)
                other = matrix(6 + rank, M, N, dtype, integers=True)
                both = ops.all_gather_matmul_both(x, other, w, True, True, counts, name(), num_chunks=chunks)
                for y, e in zip(ys, expected, strict=True):
                    assert same_bits(y, e), (M, dtype, chunks)
                # Equal numbers: a sum of one negative zero has its sign, or not.
                for dw, dy in zip(dws, dys, strict=True):
                    assert torch.equal(dw, (dy.double().t() @ full.double()).to(dtype)), (M, dtype, chunks)
                assert torch.equal(both[0], (full.double() @ w.double()).to(dtype)), (M, dtype, chunks)
                assert torch.equal(both[1], (full.double().t() @ other.double()).to(dtype)), (M, dtype, chunks)


def check_scatter(rank: int, world: int) -> None:
    for seed, (M, K, N) in enumerate(SHAPES):
        for splits in (None, rows_of(M, world)):
            counts = rows_per_rank(M, world, splits)
            for dtype in FLOATS if M < 600 else FLOATS[:1]:
                for integers in (True, False):
                    xs = [matrix(seed + i, M, K, dtype, integers) for i in range(2)]
                    ws = [matrix(100 + seed + i, N, K, dtype, integers) for i in range(2)]
                    bias = matrix(7, 1, N, dtype, integers)[0]
                    residual = matrix(8, M, N, dtype, integers).split(counts)[rank]
                    mine = [share(x, rank, world, 1) for x in xs], [share(w, rank, world, 1) for w in ws]
                    exact = sum(x.double() @ w.double().t() for x, w in zip(xs, ws, strict=True)).split(counts)[rank]
                    expected = scatter_reference(*mine, bias, residual, splits, name())
                    for chunks in CHUNKS:
                        y = ops.matmul_reduce_scatter(*mine, bias, residual, splits, name(), num_chunks=chunks)
                        close(y, exact + bias.double() + residual.double(), 2 * K, (M, dtype, splits, chunks))
                        assert not integers or same_bits(y, expected), (M, dtype, splits, chunks)


def check_reduce(rank: int, world: int) -> None:
    for seed, (M, K, N) in enumerate(SHAPES):
        for dtype in FLOATS if M < 600 else FLOATS[:1]:
            for integers in (True, False):
                xs = [matrix(seed + i, M, K, dtype, integers) for i in range(2)]
                ws = [matrix(100 + seed + i, N, K, dtype, integers) for i in range(2)]
                bias, residual = matrix(7, 1, N, dtype, integers)[0], matrix(8, M, N, dtype, integers)
                mine = [share(x, rank, world, 1) for x in xs], [share(w, rank, world, 1) for w in ws]
                exact = sum(x.double() @ w.double().t() for x, w in zip(xs, ws, strict=True))
                expected = reduce_reference(*mine, bias, residual, name())
                for chunks in CHUNKS:
                    y = ops.matmul_all_reduce(*mine, bias, residual, name(), num_chunks=chunks)
                    close(y, exact + bias.double() + residual.double(), 2 * K, (M, dtype, chunks))
                    assert not integers or same_bits(y, expected), (M, dtype, chunks)
                    everyone = [torch.empty_like(y) for _ in range(world)]
                    dist.all_gather(everyone, y)
                    assert all(same_bits(y, other) for other in everyone), "ranks hold different bits"


def check_values(rank: int, world: int, folder: str, nodes: str) -> None:
    start(rank, world, folder, nodes)
    check_gather(rank, world)
    check_scatter(rank, world)
    check_reduce(rank, world)


@pytest.mark.parametrize("nodes", NODES)
def test_values_between_hosts(nodes, tmp_path):
    run_ranks(check_values, len(nodes), str(tmp_path), nodes, backend="none")


def check_backward(rank: int, world: int, folder: str, nodes: str) -> None:
    """Through the public functions, which let pypar decide: chunked, with this calibration, from 256 rows on."""
    start(rank, world, folder, nodes)
    pypar.calibrate(calibration=SLOW_WIRE)
    for M in (13, 600):
        K, N = 10, 6
        counts = rows_of(M, world)
        full, whole = (matrix(i, n, K, torch.float64).requires_grad_() for i, n in enumerate((M, N)))
        factor = matrix(3, M, N, torch.float64)
        ((full @ whole.t()) * factor).sum().backward()

        # Rows cut, then gathered: every rank has the same weight, and the sum over ranks of the same loss.
        x = full.detach().split(counts)[rank].clone().requires_grad_()
        w = whole.detach().clone().requires_grad_()
        bias = torch.zeros(N, dtype=torch.float64, requires_grad=True)
        (y,) = pypar.ops.all_gather_matmul(x, [w], biases=[bias], splits=counts)
        (y * factor).sum().backward()
        torch.testing.assert_close(x.grad, world * full.grad.split(counts)[rank])
        torch.testing.assert_close(w.grad, whole.grad)
        torch.testing.assert_close(bias.grad, factor.sum(0))

        # Columns cut, then summed: to the owners of rows, and to all.
        for scatters in (True, False):
            x = share(full.detach(), rank, world, 1).clone().requires_grad_()
            w = share(whole.detach(), rank, world, 1).clone().requires_grad_()
            mine = factor.split(counts)[rank] if scatters else factor
            residual = torch.zeros_like(mine, requires_grad=True)
            if scatters:
                y = pypar.ops.matmul_reduce_scatter(x, w, residual=residual, splits=counts)
            else:
                y = pypar.ops.matmul_all_reduce(x, w, residual=residual)
            (y * mine).sum().backward()
            torch.testing.assert_close(x.grad, share(full.grad, rank, world, 1))
            torch.testing.assert_close(w.grad, share(whole.grad, rank, world, 1))
            torch.testing.assert_close(residual.grad, mine)


SLOW_WIRE = pypar.Calibration(
    latency_s=1e-9,
    bytes_per_s=1e6,
    chunk_s=1e-9,
    wire_cpu=0,
    float32_flops=1e9,
    float64_flops=1e9,
    bfloat16_flops=1e9,
    float16_flops=1e9,
)


@pytest.mark.parametrize("nodes", ["ab", "aabb", "aab"])
def test_backward_between_hosts(nodes, tmp_path):
    run_ranks(check_backward, len(nodes), str(tmp_path), nodes, backend="none")


def results_of(rank: int, world: int, chunks: int) -> list[torch.Tensor]:
    M, K, N = 515, 96, 80
    x, w = matrix(1, M, K, torch.float32), matrix(2, N, K, torch.float32)
    counts = rows_of(M, world)
    mine = [share(x, rank, world, 1)], [share(w, rank, world, 1)]
    rows = x.split(counts)[rank]
    y = ops.matmul_all_reduce(*mine, None, None, name(), num_chunks=chunks)
    z = ops.matmul_reduce_scatter(*mine, None, None, counts, name(), num_chunks=chunks)
    gathered = ops.all_gather_matmul(rows, [w], [], counts, name(), num_chunks=chunks)
    dws = ops.all_gather_matmul_dw(rows, [y], counts, name(), num_chunks=chunks)
    return [y, z, *gathered, *dws]


STALL = """
import os, random, select, signal, sys, time
random.seed(int(sys.argv[2]))
while not select.select([sys.stdin], [], [], random.random() * 0.008)[0]:
    os.kill(int(sys.argv[1]), signal.SIGSTOP)
    time.sleep(random.random() * 0.004)
    os.kill(int(sys.argv[1]), signal.SIGCONT)
"""


def check_stalls(rank: int, world: int, folder: str, nodes: str) -> list[torch.Tensor]:
    """The same bits in every call, while a child of this rank stops and continues it at random."""
    start(rank, world, folder, nodes)
    first = {chunks: results_of(rank, world, chunks) for chunks in (1, 3, 8)}
    command = [sys.executable, "-S", "-E", "-c", STALL, str(os.getpid()), str(rank)]
    child = subprocess.Popen(command, stdin=subprocess.PIPE)
    try:
        for _ in range(6):
            for chunks, expected in first.items():
                for a, b in zip(results_of(rank, world, chunks), expected, strict=True):
                    assert same_bits(a, b), f"other bits in {chunks} chunks"
    finally:
        child.communicate()  # ends it, behind a SIGCONT
    return first[3] + first[8]


@pytest.mark.parametrize("nodes", ["ab", "aab"])
def test_the_same_bits_in_every_run_and_on_every_rank(nodes, tmp_path):
    runs = []
    for run in range(2):
        (tmp_path / str(run)).mkdir()
        runs.append(run_ranks(check_stalls, len(nodes), str(tmp_path / str(run)), nodes, backend="none"))
    for one, other in zip(*runs, strict=True):
        assert all(same_bits(a, b) for a, b in zip(one, other, strict=True)), "two runs differ"
    for rank in runs[0]:
        assert same_bits(rank[0], runs[0][0][0]), "ranks differ"


def one_dies(rank: int, world: int, folder: str, nodes: str) -> str:
    start(rank, world, folder, nodes)
    x, w = torch.ones(4000, 64), torch.ones(512, 64)
    rows = torch.ones(500, 64)
    if rank == world - 1:
        ops.matmul_all_reduce([x], [w], None, None, name(), num_chunks=8)
        os.kill(os.getpid(), signal.SIGKILL)
    with pytest.raises(pypar.PeerError) as caught:
        while True:
            ops.matmul_all_reduce([x], [w], None, None, name(), num_chunks=8)
            ops.matmul_reduce_scatter([x], [w], None, None, None, name(), num_chunks=8)
            ops.all_gather_matmul(rows, [w], [], None, name(), num_chunks=8)
    died = time.time()
    with pytest.raises(pypar.PeerError):  # sticky
        ops.all_gather_matmul(rows, [w], [], None, name(), num_chunks=2)
    assert time.time() - died < 1
    return str(caught.value)


@pytest.mark.parametrize("nodes", ["ab", "aab"])
def test_a_rank_that_dies_ends_the_wait(nodes, tmp_path):
    started = time.time()
    *messages, failures = run_ranks(one_dies, len(nodes), str(tmp_path), nodes, backend="none", expect_failure=True)
    victim = len(nodes) - 1
    assert list(failures) == [victim], failures
    assert time.time() - started < 30  # not the timeout of the group
    for message in messages[:victim]:
        assert f"rank {victim}" in message, message


CALLS: list[Callable[[int], object]] = [
    lambda rank: ops.matmul_all_reduce(
        [torch.ones(900 + rank, 8)], [torch.ones(90, 8)], None, None, name(), num_chunks=4
    ),
    lambda rank: ops.matmul_reduce_scatter(
        [torch.ones(90, 8)], [torch.ones(90 + rank, 8)], None, None, None, name(), num_chunks=4
    ),
    lambda rank: ops.all_gather_matmul(torch.ones(90, 8), [torch.ones(3, 8)], [], None, name(), num_chunks=4 + rank),
]


def disagree(rank: int, world: int, folder: str, nodes: str, call: int) -> str:
    start(rank, world, folder, nodes)
    with pytest.raises(pypar.PeerError) as caught:
        CALLS[call](rank)
    return str(caught.value)


@pytest.mark.parametrize(
    ("call", "what"), [(0, "[901, 90] in 4 chunks"), (1, "[90, 91] in 4 chunks"), (2, "[180, 8] in 5 chunks")]
)
def test_ranks_that_disagree_are_told_apart(call, what, tmp_path):
    for message in run_ranks(disagree, 2, str(tmp_path), "ab", call, backend="none"):
        assert "disagree" in message and what in message and "rank 1 called" in message, message


def compiled(rank: int, world: int, folder: str, nodes: str) -> None:
    start(rank, world, folder, nodes)
    pypar.calibrate(calibration=SLOW_WIRE)
    x, w = torch.randn(300, 32, requires_grad=True), torch.randn(40, 32)

    def block(x: torch.Tensor) -> torch.Tensor:
        return pypar.ops.matmul_all_reduce(x, w).relu()

    y = torch.compile(block, fullgraph=True, backend="aot_eager")(x)
    assert same_bits(y, block(x))
    y.sum().backward()
    torch.testing.assert_close(x.grad, (y > 0).float() @ w)
    args = ([x.detach()], [w], None, None, name(), "run", None, 3)
    torch.library.opcheck(ops.matmul_all_reduce.default, args)


def test_compiles_between_hosts(tmp_path):
    run_ranks(compiled, 2, str(tmp_path), "ab", backend="none")
