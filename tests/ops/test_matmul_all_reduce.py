import pytest
import torch
import torch.distributed as dist
from ops.collective_cases import name, same_bits
from ops.matmul_cases import FLOATS, SHAPES, close, matrix, share

import pypar
from pypar.reference.matmul_all_reduce import matmul_all_reduce as reference
from pypar.testing import run_ranks


def check_values(rank, world):
    for seed, (M, K, N) in enumerate(SHAPES):
        for dtype in FLOATS if M < 3000 else FLOATS[:1]:
            for integers in (True, False):
                xs = [matrix(seed + i, M, K, dtype, integers) for i in range(2)]
                ws = [matrix(100 + seed + i, N, K, dtype, integers) for i in range(2)]
                bias, residual = matrix(7, 1, N, dtype, integers)[0], matrix(8, M, N, dtype, integers)
                mine = [share(x, rank, world, 1) for x in xs], [share(w, rank, world, 1) for w in ws]
                y = torch.ops.pypar.matmul_all_reduce(*mine, bias, residual, name())
                exact = sum(x.double() @ w.double().t() for x, w in zip(xs, ws, strict=True))
                close(y, exact + bias.double() + residual.double(), 2 * K, (M, K, N, dtype))
                if integers:
                    assert same_bits(y, reference(*mine, bias, residual, name())), (M, dtype)
                everyone = [torch.empty_like(y) for _ in range(world)]
                dist.all_gather(everyone, y)
                assert all(same_bits(y, other) for other in everyone), "ranks hold different bits"


def check_backward(rank, world):
    M, K, N = 13, 10, 6
    full, whole = (matrix(i, n, K, torch.float64).requires_grad_() for i, n in enumerate((M, N)))
    factor = matrix(3, M, N, torch.float64)
    ((full @ whole.t()) * factor).sum().backward()
    x = share(full.detach(), rank, world, 1).clone().requires_grad_()
    w = share(whole.detach(), rank, world, 1).clone().requires_grad_()
    bias = torch.zeros(N, dtype=torch.float64, requires_grad=True)
    residual = torch.zeros(M, N, dtype=torch.float64, requires_grad=True)
    (pypar.ops.matmul_all_reduce(x, w, bias=bias, residual=residual) * factor).sum().backward()
    torch.testing.assert_close(x.grad, share(full.grad, rank, world, 1))
    torch.testing.assert_close(w.grad, share(whole.grad, rank, world, 1))
    torch.testing.assert_close(bias.grad, factor.sum(0))
    torch.testing.assert_close(residual.grad, factor)


def check_opcheck_and_errors(rank, world):
    x, w = torch.ones(5, 4), torch.ones(3, 4)
    torch.library.opcheck(torch.ops.pypar.matmul_all_reduce.default, ([x], [w], None, None, name()))
    with pytest.raises(ValueError, match="M is 5 in x, but 6 in x"):
        torch.ops.pypar.matmul_all_reduce([x, torch.ones(6, 4)], [w, w], None, None, name())
    with pytest.raises(ValueError, match="x is Long, expected float32"):
        torch.ops.pypar.matmul_all_reduce([x.long()], [w.long()], None, None, name())


def check(rank, world):
    check_values(rank, world)
    check_backward(rank, world)
    check_opcheck_and_errors(rank, world)


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_matmul_all_reduce(world):
    run_ranks(check, world)
