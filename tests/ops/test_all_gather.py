import pytest
import torch
import torch.distributed._symmetric_memory as symm
from ops.collective_cases import FLOATS, INTEGERS, name, same_bits, tensor_of

import pypar
from pypar.testing import run_ranks


def check(rank, world):
    for seed, rows in enumerate([0, 1, 5, 1000, 90001]):
        for dtype in [*FLOATS, *INTEGERS, torch.bool] if rows < 5000 else FLOATS[:1]:
            for splits in (None, [rows + 2 * r for r in range(world)]):
                counts = splits or [rows] * world
                parts = [tensor_of(r, seed, (counts[r], 3), dtype) for r in range(world)]
                want = torch.cat(parts)
                assert same_bits(torch.ops.pypar.all_gather(parts[rank], name(), splits), want), (rows, dtype, splits)
                out = symm.empty(*want.shape, dtype=dtype, device="cpu")
                symm.rendezvous(out, name())
                torch.ops.pypar.all_gather_out(out, parts[rank], name(), splits)
                assert same_bits(out, want), ("symmetric", rows, dtype, splits)
    x = tensor_of(rank, 1, (2 + rank, 3), torch.float64).requires_grad_()
    splits = [2 + r for r in range(world)]
    weight = tensor_of(0, 2, (sum(splits), 3), torch.float64)
    (pypar.ops.all_gather(x, splits=splits) * weight * (rank + 1)).sum().backward()
    want = weight.split(splits)[rank] * sum(r + 1 for r in range(world))
    torch.testing.assert_close(x.grad, want)
    torch.library.opcheck(torch.ops.pypar.all_gather.default, (x.detach()[:2].clone(), name()))
    with pytest.raises(ValueError, match="x has"):
        torch.ops.pypar.all_gather(x.detach(), name(), [9] * world)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_all_gather(world_size):
    run_ranks(check, world_size)
