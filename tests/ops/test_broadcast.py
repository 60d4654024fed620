import pytest
import torch
import torch.distributed._symmetric_memory as symm
from ops.collective_cases import FLOATS, INTEGERS, SIZES, name, same_bits, tensor_of

import pypar
from pypar.testing import run_ranks


def check(rank, world):
    for root in range(world):
        for seed, n in enumerate(SIZES):
            for dtype in [*FLOATS, *INTEGERS, torch.bool] if n < 5000 else FLOATS[:1]:
                parts = [tensor_of(r, seed, (n,), dtype) for r in range(world)]
                x = parts[rank].clone()
                torch.ops.pypar.broadcast_(x, root, name())
                assert same_bits(x, parts[root]), (n, dtype)
                t = symm.empty(n, dtype=dtype, device="cpu")
                symm.rendezvous(t, name())
                t.copy_(parts[rank])
                torch.ops.pypar.broadcast_(t, root, name())
                assert same_bits(t, parts[root]), ("symmetric", n, dtype)
    x = tensor_of(rank, 1, (4, 6), torch.float64).requires_grad_()
    (pypar.ops.broadcast(x, root=world - 1) * (rank + 1)).sum().backward()
    share = sum(r + 1.0 for r in range(world)) if rank == world - 1 else 0.0
    assert torch.equal(x.grad, torch.full((4, 6), share, dtype=torch.float64))
    torch.library.opcheck(torch.ops.pypar.broadcast.default, (x.detach(), 0, name()))
    with pytest.raises(ValueError, match="root 9 is not a rank"):
        torch.ops.pypar.broadcast(x.detach(), 9, name())


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_broadcast(world_size):
    run_ranks(check, world_size)
