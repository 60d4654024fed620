"""Bytes that each kernel loads and stores, counted in the interpreter and the emulation, against the least possible.

To peers: what must travel and no more, but for flags. Locally: not more than the protocol explains. Moving something
twice is noticed.
"""

from __future__ import annotations

import dataclasses
import importlib.util

import pytest
from kernels import bytes_cuda, bytes_triton
from kernels.bytes_least import Moved
from kernels.cuda_executor import COMPILER, ROOT

needs_compiler = pytest.mark.skipif(COMPILER is None, reason="no g++ on this machine")
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
SLACK = 0.005  # flags, counters, the last 16 bytes of a part

# Of 2 ranks, in times of the least. Everything else sends what must travel, once.
TO_PEERS = {
    "one_shot_all_reduce": 2.0,  # pairs: 4 bytes and the number of the call
    "vocab_cross_entropy": 1.5 + 0.02,  # 3 numbers of each row, where 2 must travel; flags for 100 rows weigh more
    "vocab_cross_entropy, smoothed": 2.0 + 0.02,  # 4 numbers
}

# Read and written locally, in times of the least: n bytes of input for each rank. "+ slot": what arrived is read.
LOCAL = {
    "one_shot_all_reduce": 5 / 2,  # x to push, x to add, pairs + slot 2n; out
    "two_shot_all_reduce": 3 / 2,  # x, + slot n/2 of chunks and n/2 of results; out
    "reduce_scatter": 4 / 3,  # x, + slot n/2; out n/2
    "all_gather": 5 / 3,  # the shard to push and to keep, + slot; full
    "all_gather_copied": 3 / 2,  # the shard to push and to keep; the own place
    "zero_scatter": 7 / 6,  # as reduce_scatter; the shard, float32, read and written
    "zero_step": 20 / 19,  # + slot n/2, beside 4 states of float32 read and written and the cast
    "ring": 1,
    # The own part goes through the own slot, too: 1 n more written and read than in CUDA.
    "all_reduce one_shot": 5 / 2,
    "all_reduce two_shot": 5 / 2,
    "all_reduce two_shot, halves": 5 / 2,
    # Tiles of 64 read x ceil(N / 64) = 3 times and w ceil(M / 64) = 2 times, + slot; on a GPU mostly from caches.
    "all_gather_matmul, pushed by a kernel": 2.1,
    "all_gather_matmul, pushed by copies": 2.1,
    "all_gather_matmul, w through descriptors": 2.1,
    "matmul_reduce_scatter": 2.75,
    "matmul_reduce_scatter, through descriptors": 2.75,
    "matmul_all_reduce in one step": 2.85,
    "matmul_all_reduce in two steps": 2.5,
    # Logits once; of each row the numbers go through the own slot, too.
    "vocab_cross_entropy": 1.1,
    "vocab_cross_entropy, smoothed": 1.1,
    "vocab_cross_entropy_dlogits": 1.01,  # target and stats once for each tile of columns
}


def check(row: Moved) -> None:
    assert row.from_peers == 0, row  # the writer pushes, the reader looks at its own memory
    assert row.read >= row.least.read and row.to_peers >= row.least.to_peers, ("less than the least", row)
    assert row.written >= row.least.written, ("less than the least", row)
    assert row.peers_ratio <= TO_PEERS.get(row.kernel, 1.0) + SLACK, (row.peers_ratio, row)
    assert row.local_ratio <= LOCAL[row.kernel] + SLACK, (row.local_ratio, row)


@needs_compiler
def test_cuda_kernels_move_what_they_must():
    rows = bytes_cuda.rows()
    assert {row.kernel for row in rows} == set(bytes_cuda.LEAST)
    for row in rows:
        check(row)


@pytest.mark.slow
@needs_triton
def test_triton_kernels_move_what_they_must():
    rows = bytes_triton.rows()
    assert {row.kernel for row in rows} == set(LOCAL) - set(bytes_cuda.LEAST)
    for row in rows:
        check(row)


@dataclasses.dataclass
class Waste:
    what: str
    file: str
    old: str
    new: str
    kernel: str
    ratio: str
    seen: float  # the ratio then is at least


PUSH = "copy_run(slot + run.begin, x + cuts.begin[owner] + run.begin, run.num);"
KEEP = "  if (own != shard) copy_run(own + mine.begin, shard + mine.begin, mine.num);\n"
CUDA_WASTE = [
    Waste("a shard pushed twice", "reduce_scatter.cuh", PUSH, PUSH + PUSH, "reduce_scatter", "peers_ratio", 2.0),
    Waste("the own shard copied twice", "all_gather.cuh", KEEP, KEEP + KEEP, "all_gather", "local_ratio", 2.3),
]


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("waste", CUDA_WASTE, ids=lambda waste: waste.what)
def test_waste_in_a_cuda_kernel_is_noticed(waste, tmp_path):
    text = (ROOT / "csrc" / "cuda" / waste.file).read_text()
    assert text.count(waste.old) == 1
    (tmp_path / "cuda").mkdir()
    (tmp_path / "cuda" / waste.file).write_text(text.replace(waste.old, waste.new))
    notice(waste, bytes_cuda.rows_of(bytes_cuda.build(tmp_path, tmp_path)))


SHARD = "        tl.store(slot + at, tl.load(x + at, mask), mask)\n"
LOGITS = '            x = tl.load(at, mask, other=float("-inf")).to(tl.float32)\n'
CHUNK = "            tl.store(part + at, value, {mask} & free)\n        if free:"
TRITON_WASTE = [
    Waste(
        "a shard pushed twice",
        "all_gather_matmul",
        SHARD,
        SHARD + SHARD,
        "all_gather_matmul, pushed by a kernel",
        "peers_ratio",
        2.0,
    ),
    Waste(
        "logits read twice",
        "vocab_cross_entropy",
        LOGITS,
        LOGITS + LOGITS,
        "vocab_cross_entropy",
        "local_ratio",
        2.0,
    ),
    Waste(
        "a chunk's end not masked",  # what is too much goes to the slot's next part; results are not looked at here
        "all_reduce",
        CHUNK.format(mask="(at < stride)"),
        CHUNK.format(mask="(at >= 0)"),
        "all_reduce two_shot",
        "peers_ratio",
        1.012,
    ),
]


@pytest.mark.slow
@needs_triton
@pytest.mark.parametrize("waste", TRITON_WASTE, ids=lambda waste: waste.what)
def test_waste_in_a_triton_kernel_is_noticed(waste, tmp_path):
    notice(waste, bytes_triton.count(waste.kernel, (waste.file, waste.old, waste.new), str(tmp_path)))


def notice(waste: Waste, rows: list[Moved]) -> None:
    row = next(row for row in rows if row.kernel == waste.kernel)
    assert getattr(row, waste.ratio) >= waste.seen, (waste, row)
    with pytest.raises(AssertionError):
        check(row)
