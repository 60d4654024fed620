import pytest
import torch
import torch.distributed._symmetric_memory as symm
from ops.collective_cases import FLOATS, name, same_bits, tensor_of

import pypar
from pypar.reference.collectives import reduce_in_rank_order, rows_per_rank
from pypar.testing import run_ranks


def check(rank, world):
    for seed, rows in enumerate([0, 1, world - 1, world, world + 1, 127, 129, 9001, 300001]):
        for dtype in FLOATS if rows < 10000 else FLOATS[:1]:
            for splits in (None, [rows] + [0] * (world - 1)):
                shape = (rows, 3)
                parts = [tensor_of(r, seed, shape, dtype) for r in range(world)]
                counts = rows_per_rank(rows, world, splits)
                want = reduce_in_rank_order(parts, "avg").split(counts)[rank]
                got = torch.ops.pypar.reduce_scatter(parts[rank], "avg", name(), splits)
                assert same_bits(got, want), (rows, dtype, splits)
                t = symm.empty(*shape, dtype=dtype, device="cpu")
                symm.rendezvous(t, name())
                t.copy_(parts[rank])
                out = torch.empty_like(want)
                torch.ops.pypar.reduce_scatter_out(out, t, "avg", name(), splits)
                assert same_bits(out, want), ("symmetric", rows, dtype, splits)
    x = tensor_of(rank, 1, (7, 2), torch.float64).requires_grad_()
    y = pypar.ops.reduce_scatter(x)
    (y * (rank + 1)).sum().backward()
    counts = rows_per_rank(7, world, None)
    want = torch.cat([torch.full((n, 2), r + 1.0, dtype=torch.float64) for r, n in enumerate(counts)])
    assert torch.equal(x.grad, want)
    torch.library.opcheck(torch.ops.pypar.reduce_scatter.default, (x.detach(), "sum", name()))
    with pytest.raises(ValueError, match="sum to 8, but dim 0 has 7"):
        torch.ops.pypar.reduce_scatter(x.detach(), "sum", name(), [8] + [0] * (world - 1))
    with pytest.raises(ValueError, match=r"expected Double with"):
        torch.ops.pypar.reduce_scatter_out(torch.empty(1, 9), x.detach(), "sum", name())


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_reduce_scatter(world_size):
    run_ranks(check, world_size)
