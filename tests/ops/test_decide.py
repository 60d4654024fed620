"""Which form a fused matmul takes: a pure function, the same on every rank, and its explanation."""

from __future__ import annotations

import os
import time
from dataclasses import astuple, replace

import pytest
import torch
import torch.distributed as dist
from ops.collective_cases import name

import pypar
from pypar import backend, doctor
from pypar.testing import run_ranks

pytestmark = pytest.mark.skipif(not backend.available(), reason="needs the compiled extension")

GIGABIT = pypar.Calibration(
    latency_s=1e-4,
    bytes_per_s=1.25e8,
    chunk_s=1e-4,
    wire_cpu=0.1,
    float32_flops=1e11,
    float64_flops=5e10,
    bfloat16_flops=2e11,
    float16_flops=1e10,
)
EVEN = {  # where the wire takes about as long as the matmul
    "all_gather_matmul": [(1024, 1024), (1024, 1024)],
    "all_gather_matmul_dw": [(1024, 1024), (2048, 1024)],
    "all_gather_matmul_both": [(1024, 1024), (2048, 512), (1024, 512)],
    "matmul_reduce_scatter": [(2048, 1024), (1024, 1024)],
    "matmul_all_reduce": [(2048, 1024), (1024, 1024)],
}


@pytest.mark.parametrize("op", EVEN)
def test_chunks_where_they_gain(op):
    for hosts in ([1, 1], [2, 2], [2, 1], [1, 1, 1]):
        # The same M and wire, whatever the number of ranks.
        world = sum(hosts)
        shapes = EVEN[op]
        if op.startswith("all_gather_matmul"):
            shapes = [(2048 // world, shapes[0][1]), *shapes[1:]]
            if op != "all_gather_matmul":
                shapes[1] = (shapes[0][0] * world, shapes[1][1])
        e = pypar.explain(op, shapes, hosts=hosts, calibration=GIGABIT)
        assert e.form == "chunked" and e.num_chunks > 1, e.text
        assert e.chunked_s * 1.05 <= e.whole_s, e.text
        assert max(e.matmul_s, e.wire_s) < e.chunked_s < e.whole_s, e.text
        assert f"chunked, {e.num_chunks} chunks" in e.text and op in e.text and f"{len(hosts)} hosts" in str(e)
        # Pure: asked again, the same.
        assert e == pypar.explain(op, shapes, hosts=hosts, calibration=replace(GIGABIT))


def test_whole_where_chunks_gain_nothing():
    def form(M: int, K: int, N: int, **changes: float) -> pypar.ops.Explanation:
        return pypar.explain(
            "matmul_all_reduce", [(M, K), (N, K)], hosts=[1, 1], calibration=replace(GIGABIT, **changes)
        )

    assert form(2048, 1024, 1024).form == "chunked"
    for M in (0, 1, 47):
        e = form(M, 4096, 4096)
        assert e.form == "whole" and e.num_chunks == 1 and f"{M} rows are below 48" in e.text
    assert "make no two chunks of 64" in form(100, 4096, 4096).text
    fast = form(2048, 1024, 1024, bytes_per_s=1e12)
    assert fast.form == "whole" and "less than 5 %" in fast.text
    slow = form(2048, 1024, 1024, bytes_per_s=1e6)
    assert slow.form == "whole" and "less than 5 %" in slow.text
    assert form(2048, 1024, 1024, chunk_s=1.0).form == "whole"
    assert form(2048, 1024, 1024, wire_cpu=1.0, bytes_per_s=1e9).form == "whole"


def test_more_of_what_chunks_cost_never_makes_more_of_them():
    def chunks(chunk_s: float) -> int:
        return pypar.explain(
            "matmul_all_reduce",
            EVEN["matmul_all_reduce"],
            hosts=[1, 1],
            calibration=replace(GIGABIT, chunk_s=chunk_s),
        ).num_chunks

    numbers = [chunks(10.0**-k) for k in range(7, 0, -1)]
    assert numbers == sorted(numbers, reverse=True) and numbers[0] > numbers[-1] == 1, numbers


def test_half_types_are_summed_in_float32_where_a_host_has_several_ranks():
    def wire(op: str, hosts: list[int]) -> float:
        shapes = [(1024, 1024), (1024, 1024)]
        return pypar.explain(op, shapes, torch.bfloat16, hosts=hosts, calibration=GIGABIT).wire_s

    assert wire("matmul_all_reduce", [2, 2]) == 2 * wire("matmul_all_reduce", [1, 1])
    assert wire("all_gather_matmul", [2, 2]) == 2 * wire("all_gather_matmul", [1, 1])  # of twice the rows


def test_one_host_has_nothing_to_decide():
    e = pypar.explain("matmul_all_reduce", [(2048, 1024), (1024, 1024)], hosts=[4])
    assert e.form == "one host" and "4 ranks on 1 host:" in e.text and e.whole_s is None


def test_wrong_questions():
    with pytest.raises(ValueError, match="unknown op 'all_reduce'; it knows all_gather_matmul"):
        pypar.explain("all_reduce", [(2, 2)], hosts=[1, 1], calibration=GIGABIT)
    with pytest.raises(ValueError, match=r"takes x \[M, K\], w \[N, K\], got \[\[2, 3\], \[4, 5\]\]"):
        pypar.explain("matmul_all_reduce", [(2, 3), (4, 5)], hosts=[1, 1], calibration=GIGABIT)
    with pytest.raises(ValueError, match=r"takes dy \[M_r, N\]"):
        pypar.explain("all_gather_matmul_both", [(2, 3), (4, 5)], hosts=[1, 1], calibration=GIGABIT)
    with pytest.raises(ValueError, match="without a calibration"):
        pypar.explain("matmul_all_reduce", [(2, 3), (4, 3)], hosts=[1, 1])
    with pytest.raises(ValueError, match=r"hosts is \[1, 0\]"):
        pypar.explain("matmul_all_reduce", [(2, 3), (4, 3)], hosts=[1, 0], calibration=GIGABIT)
    with pytest.raises(ValueError, match=r"got torch\.int64"):
        pypar.explain("matmul_all_reduce", [(2, 3), (4, 3)], torch.int64, hosts=[1, 1], calibration=GIGABIT)
    with pytest.raises(ValueError, match="latency_s is 0, expected a positive number"):
        replace(GIGABIT, latency_s=0)
    with pytest.raises(ValueError, match="wire_cpu is 2, expected 0 to 1"):
        replace(GIGABIT, wire_cpu=2)


def test_doctor_says_which_form(capsys):
    assert doctor.main([]) == 0
    out = capsys.readouterr().out
    for op in ("all_gather_matmul", "matmul_reduce_scatter", "matmul_all_reduce"):
        (row,) = [line for line in out.splitlines() if line.startswith(f"torch.ops.pypar.{op} ")]
        assert "one host: C++ on shared memory" in row and "between hosts" in row and "chunked, " in row, row


def agree(rank: int, world: int, folder: str, nodes: str) -> tuple[list[float], str, torch.Tensor]:
    os.environ["PYPAR_NODE_ID"] = nodes[rank]
    dist.init_process_group("pypar", store=dist.FileStore(f"{folder}/store", world), rank=rank, world_size=world)
    time.sleep(0.1 * rank)
    x, w = torch.ones(300, 40), torch.ones(60, 40)
    y = pypar.ops.matmul_all_reduce(x, w)  # measures
    measured = pypar.explain("matmul_all_reduce", [(300, 40), (60, 40)])
    assert measured.form in ("whole", "chunked") and f"{world} ranks on 2 hosts" in measured.text
    again = pypar.calibrate()
    assert all(0 <= value < 1e15 for value in astuple(again)) and again.wire_cpu <= 1, again
    assert pypar.calibrate(calibration=GIGABIT) == GIGABIT
    shapes = [(2048, 1024), (1024, 1024)]
    e = pypar.explain("matmul_all_reduce", shapes)
    assert e == pypar.explain("matmul_all_reduce", shapes, hosts=[nodes.count(n) for n in "ab"], calibration=GIGABIT)
    with pytest.raises(ValueError, match="the ranks give different calibrations"):
        pypar.calibrate(calibration=replace(GIGABIT, latency_s=1.0 + rank))
    with pytest.raises(ValueError, match="num_chunks is -1"):
        torch.ops.pypar.matmul_all_reduce([x], [w], None, None, name(), num_chunks=-1)
    assert pypar.calibrate() is not None  # the ranks are still in step
    alone = dist.new_group([0, 1] if nodes[:2] == "aa" else [0])
    if rank == 0 or nodes[: rank + 1] == "aa":
        assert pypar.calibrate(alone) is None
        assert pypar.explain("matmul_all_reduce", shapes, group=alone).form == "one host"
    return list(astuple(again)), measured.text, y


@pytest.mark.parametrize("nodes", ["ab", "aab"])
def test_all_ranks_agree(nodes, tmp_path):
    first, *others = run_ranks(agree, len(nodes), str(tmp_path), nodes, backend="none")
    for other in others:
        assert other[:2] == first[:2] and torch.equal(other[2], first[2])
    assert torch.equal(first[2], torch.full((300, 60), 40.0 * len(nodes)))
