import pytest
import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as symm
from ops.collective_cases import FLOATS, INTEGERS, SIZES, name, same_bits, tensor_of

import pypar
from pypar.reference.collectives import reduce_in_rank_order
from pypar.testing import run_ranks


def check_values(rank, world):
    for seed, n in enumerate(SIZES):
        for dtype in FLOATS if n < 50000 else FLOATS[:2]:
            parts = [tensor_of(r, seed, (n,), dtype) for r in range(world)]
            want = reduce_in_rank_order(parts, "sum")
            assert same_bits(torch.ops.pypar.all_reduce(parts[rank], "sum", name()), want), (n, dtype)
            t = symm.empty(n, dtype=dtype, device="cpu")
            symm.rendezvous(t, name())
            t.copy_(parts[rank])
            torch.ops.pypar.all_reduce_(t, "sum", name())
            assert same_bits(t, want), ("symmetric", n, dtype)
            # one rank's tensor is symmetric, the others' are not: all must take the same way
            mixed = t.copy_(parts[rank]) if rank == 0 else parts[rank].clone()
            torch.ops.pypar.all_reduce_(mixed, "sum", name())
            assert same_bits(mixed, want), ("mixed", n, dtype)
    for op in ("sum", "avg", "max", "min", "product"):
        for dtype in FLOATS:
            parts = [tensor_of(r, 7, (3, 5, 7), dtype) for r in range(world)]
            got = pypar.ops.all_reduce(parts[rank], op=op)
            assert same_bits(got, reduce_in_rank_order(parts, op)), (op, dtype)
    for op in ("sum", "max", "min", "product", "band", "bor", "bxor"):
        for dtype in [*INTEGERS, torch.bool]:
            parts = [tensor_of(r, 8, (101,), dtype) for r in range(world)]
            got = torch.ops.pypar.all_reduce(parts[rank], op, name())
            assert same_bits(got, reduce_in_rank_order(parts, op)), (op, dtype)
    x = tensor_of(rank, 9, (6, 10), torch.float32)
    want = sum(tensor_of(r, 9, (6, 10), torch.float32) for r in range(world))
    torch.ops.pypar.all_reduce_(x.t(), "sum", name())
    torch.testing.assert_close(x, want)
    special = torch.tensor([float("nan"), float("inf"), -0.0, 1e-40]) if rank == 0 else torch.zeros(4)
    for op in ("max", "min", "sum"):
        assert torch.ops.pypar.all_reduce(special, op, name())[0].isnan()
    # a half at every bit pattern survives the trip through float32
    bits = torch.arange(65536, dtype=torch.int32).to(torch.int16)
    for dtype in (torch.float16, torch.bfloat16):
        x = bits.view(dtype)
        got = torch.ops.pypar.all_reduce(
            x if rank == 0 else torch.zeros_like(x), "max" if world == 1 else "sum", name()
        )
        finite = ~x.isnan() & (x != 0)
        assert torch.equal(got[finite].view(torch.int16), x[finite].view(torch.int16))
    return torch.ops.pypar.all_reduce(tensor_of(rank, 11, (50001,), torch.bfloat16), "sum", name())


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_bits_equal_the_reference_on_every_rank(world_size):
    results = run_ranks(check_values, world_size)
    assert all(same_bits(results[0], r) for r in results)


def check_gradient_and_compile(rank, world):
    x = tensor_of(rank, 1, (4, 3), torch.float64).requires_grad_()
    weight = torch.arange(12.0, dtype=torch.float64).reshape(4, 3)
    (pypar.ops.all_reduce(x) * weight * (rank + 1)).sum().backward()
    assert torch.allclose(x.grad, weight * sum(r + 1 for r in range(world)))
    torch.library.opcheck(torch.ops.pypar.all_reduce.default, (x.detach(), "sum", name()))
    torch.library.opcheck(torch.ops.pypar.all_reduce_.default, (x.detach().clone(), "sum", name()))
    with pytest.raises(ValueError, match="unknown reduction 'mean2'"):
        torch.ops.pypar.all_reduce(x.detach(), "mean2", name())
    with pytest.raises(ValueError, match="avg has no meaning for int32"):
        torch.ops.pypar.all_reduce(torch.ones(3, dtype=torch.int32), "avg", name())
    with pytest.raises(RuntimeError, match="has no gradient"):
        pypar.ops.all_reduce(x, op="max").sum().backward()
    dist.barrier()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def f(x):
        return pypar.ops.all_reduce(x * 2) + 1

    y = torch.ones(5, requires_grad=True)
    out = f(y)
    out.sum().backward()
    assert torch.equal(out, torch.full((5,), 2.0 * world + 1))
    assert torch.equal(y.grad, torch.full((5,), 2.0 * world))


def test_gradient_opcheck_compile_and_errors():
    run_ranks(check_gradient_and_compile, 2)
