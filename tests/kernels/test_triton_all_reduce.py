"""The Triton all_reduce, interpreted, one process for each rank: the bits of the reference. The ranks import Triton."""

from __future__ import annotations

import pytest
import torch
from ops.collective_cases import same_bits

from pypar.reference.collectives import reduce_in_rank_order
from pypar.testing import run_ranks

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ALGORITHMS = ("one_shot", "two_shot")
BLOCK = 32  # small, so that there are pieces, and several blocks in each


def normals(rank, seed, numel, dtype):
    return torch.randn(numel, generator=torch.Generator().manual_seed(1000 * seed + rank)).to(dtype)


def special(rank, seed, numel, dtype):
    """Zeros of both signs, infinities, NaN and a few numbers."""
    values = torch.tensor([0.0, -0.0, 1.0, -1.0, torch.inf, -torch.inf, torch.nan, 65504.0], dtype=torch.float32)
    return values[torch.randint(0, 8, (numel,), generator=torch.Generator().manual_seed(1000 * seed + rank))].to(dtype)


def check_bits(rank, world):
    import triton_matmul_executor as ex

    from pypar.triton_kernels.all_reduce import OPS, PROGRAMS, all_reduce

    channels = {algorithm: ex.channel(f"all_reduce {algorithm}", 1 << 16) for algorithm in ALGORITHMS}
    sizes = (0, 1, world - 1, world + 1, 129, BLOCK * (PROGRAMS + 5) + 7)
    cases = [(numel, DTYPES[i % 3], OPS[i % 5], normals) for i, numel in enumerate(sizes)]
    cases += [(77, DTYPES[i % 3], op, make) for i, op in enumerate(OPS) for make in (normals, special)]
    for seed, (numel, dtype, op, make) in enumerate(cases):
        xs = [make(r, seed, numel, dtype) for r in range(world)]
        want = reduce_in_rank_order(xs, op)
        for algorithm, channel in channels.items():
            x = torch.cat([xs[rank][:0], xs[rank].new_zeros(1), xs[rank]])[1:]  # not aligned to 16 bytes
            out = x if seed % 2 else None
            got = all_reduce(x, op, algorithm, **ex.where(channel), block=BLOCK, out=out)
            channel.check()
            assert out is None or got is x
            nan = want.isnan()  # of which payload and sign are anybody's
            assert torch.equal(got.isnan(), nan), (algorithm, op, dtype, numel)
            assert same_bits(got[~nan], want[~nan]), (algorithm, op, dtype, numel)


@pytest.mark.parametrize("world_size", [1, 2, *(pytest.param(w, marks=pytest.mark.slow) for w in (3, 4))])
def test_bits_of_the_reference(world_size):
    run_ranks(check_bits, world_size)


def check_refusals(rank, world):
    import triton_matmul_executor as ex

    from pypar.triton_kernels.all_reduce import all_reduce, all_reduce_bytes

    where = ex.where(ex.channel("all_reduce", 4096))
    x = torch.ones(4, 4)
    for wrong, said in (
        ((x.double(), "sum", "one_shot"), "torch.float64"),
        ((x, "band", "one_shot"), "'band'"),
        ((x, "sum", "ring"), "'ring'"),
        ((x.t()[:2], "sum", "one_shot"), "without gaps"),
        ((torch.ones(4000), "sum", "two_shot"), f"needs {all_reduce_bytes(4000, world, torch.float32, 'two_shot')}"),
    ):
        with pytest.raises(ValueError, match=said):
            all_reduce(*wrong, **where)


def test_what_it_cannot_take_it_refuses_by_name():
    run_ranks(check_refusals, 2)
