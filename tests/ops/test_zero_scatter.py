"""zero_scatter: sums against float64 and the reference, the same bits in every run, symmetric memory, wrong input."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

import pypar
from pypar import symmetric
from pypar.reference.zero_scatter import zero_scatter as reference
from pypar.testing import run_ranks, stalls

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TOTALS = [0, 1, 5, 16, 2047, 2049, 10_000, 700_003]  # the last is more than a slot of shared memory for 4 bytes each


def sizes_of(total, world):
    """Uneven, and nothing for some."""
    first = total - total // 3 if world > 1 else total
    rest = [total - first] + [0] * (world - 2) if world > 1 else []
    return [first, *rest]


def given(total, dtype, rank):
    generator = torch.Generator().manual_seed(17 * rank + total)
    return torch.randn(total, generator=generator).to(dtype)


def check(rank, world):
    for dtype in DTYPES:
        for total in TOTALS:
            sizes = sizes_of(total, world)
            begin = sum(sizes[:rank])
            mine = slice(begin, begin + sizes[rank])
            exact = sum(given(total, dtype, r).double() for r in range(world))[mine] / world
            full = given(total, dtype, rank)
            shard = torch.full((sizes[rank],), 9.0)
            squares = pypar.ops.zero_scatter(shard, full, sizes, scale=1 / world)
            torch.testing.assert_close(shard.double(), exact, rtol=1e-6, atol=1e-6)
            torch.testing.assert_close(squares, shard.double().square().sum(), rtol=1e-5, atol=1e-9)
            same = torch.empty_like(shard)
            reference(same, full, sizes, 1 / world, False, dist.group.WORLD.group_name)
            assert torch.equal(shard, same), "rank order, in float32"
            pypar.ops.zero_scatter(shard, full, sizes, scale=1 / world, accumulate=True)
            torch.testing.assert_close(shard.double(), 2 * exact, rtol=1e-6, atol=1e-6)
            if total and symmetric.shares_memory(dist.group.WORLD):
                memory = symmetric.empty(total, dtype, dist.group.WORLD)
                memory.copy_(full)
                again = torch.empty_like(shard)
                with stalls(rank + 3):
                    pypar.ops.zero_scatter(again, memory, sizes, scale=1 / world)
                    memory.zero_()  # it is this rank's again
                assert torch.equal(again, same)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_zero_scatter(world):
    run_ranks(check, world)


def test_over_gloo():
    run_ranks(check, 2, backend="gloo")


def check_wrong(rank, world):
    full, shard = torch.zeros(6), torch.zeros(3)
    for sizes, args, text in (
        ([3, 4], (shard, full), r"sizes \[3, 4\] don't cut full \[6\] for 2 ranks"),
        ([3, 3], (shard, full.double()), "full is Double"),
        ([3, 3], (torch.zeros(2), full), rf"shard is Float\[2\], expected .* 3 numbers on rank {rank}"),
        ([3, 3], (shard.double(), full), "shard is Double"),
    ):
        with pytest.raises(ValueError, match=text):
            pypar.ops.zero_scatter(args[0], args[1], sizes)
    with pytest.raises(pypar.PeerError, match="disagree"):
        pypar.ops.zero_scatter(torch.zeros(3 if rank == 0 else 2), torch.zeros(6 - rank), [3, 3 - rank])


def test_wrong_input():
    run_ranks(check_wrong, 2)


def check_opcheck(rank, world):
    torch.library.opcheck(
        torch.ops.pypar.zero_scatter.default,
        (torch.zeros(4), torch.rand(4), [4], 1.0, False, dist.group.WORLD.group_name),
    )


def test_opcheck():
    run_ranks(check_opcheck, 1)
