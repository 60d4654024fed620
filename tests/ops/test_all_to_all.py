import pytest
import torch
import torch.distributed as dist
from ops.collective_cases import FLOATS, name, same_bits, tensor_of

import pypar
from pypar.testing import run_ranks


def rows(s, d, base):
    return base + (s * 3 + d * 5) % 4


def check(rank, world):
    for seed, base in enumerate([0, 1, 100, 40001]):
        for dtype in FLOATS if base < 1000 else FLOATS[:1]:
            table = [[rows(s, d, base) for d in range(world)] for s in range(world)]
            parts = [tensor_of(s, seed, (sum(table[s]), 2), dtype) for s in range(world)]
            want = torch.cat([parts[s].split(table[s])[rank] for s in range(world)])
            received = [table[s][rank] for s in range(world)]
            got = torch.ops.pypar.all_to_all(parts[rank], received, table[rank], name())
            assert same_bits(got, want), (base, dtype)
            even = [tensor_of(s, seed, (base * world, 2), dtype) for s in range(world)]
            want = torch.cat([e.chunk(world)[rank] for e in even]) if base else even[rank]
            assert same_bits(torch.ops.pypar.all_to_all(even[rank], None, None, name()), want)
    table = [[rows(s, d, 2) for d in range(world)] for s in range(world)]
    received = [table[s][rank] for s in range(world)]
    x = tensor_of(rank, 1, (sum(table[rank]), 2), torch.float64).requires_grad_()
    y = pypar.ops.all_to_all(x, None, received, table[rank])
    (y * (rank + 1)).sum().backward()
    want = torch.cat([torch.full((table[rank][d], 2), d + 1.0, dtype=torch.float64) for d in range(world)])
    assert torch.equal(x.grad, want)
    torch.library.opcheck(torch.ops.pypar.all_to_all.default, (x.detach(), received, table[rank], name()))
    if world > 1:
        with pytest.raises(ValueError, match="don't divide by"):
            torch.ops.pypar.all_to_all(torch.ones(world + 1, 2), None, None, name())
        dist.barrier()
        with pytest.raises(RuntimeError, match="rank 0 sends 4 float32 to rank 1, which expects 2"):
            sent = [2] * world if rank else [2] + [4] * (world - 1)
            torch.ops.pypar.all_to_all(torch.ones(sum(sent)), [2] * world, sent, name())


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_all_to_all(world_size):
    run_ranks(check, world_size)
