import pytest
import torch
from ops.collective_cases import name, same_bits
from ops.matmul_cases import FLOATS, SHAPES, close, matrix, rows_of, share

import pypar
from pypar.reference.collectives import rows_per_rank
from pypar.reference.matmul_reduce_scatter import matmul_reduce_scatter as reference
from pypar.testing import run_ranks


def check_values(rank, world):
    for seed, (M, K, N) in enumerate(SHAPES):
        for splits in (None, rows_of(M, world)):
            counts = rows_per_rank(M, world, splits)
            for dtype in FLOATS if M < 3000 else FLOATS[:1]:
                for integers in (True, False):
                    xs = [matrix(seed + i, M, K, dtype, integers) for i in range(2)]
                    ws = [matrix(100 + seed + i, N, K, dtype, integers) for i in range(2)]
                    bias = matrix(7, 1, N, dtype, integers)[0]
                    residual = matrix(8, M, N, dtype, integers).split(counts)[rank]
                    mine = [share(x, rank, world, 1) for x in xs], [share(w, rank, world, 1) for w in ws]
                    y = torch.ops.pypar.matmul_reduce_scatter(*mine, bias, residual, splits, name())
                    exact = sum(x.double() @ w.double().t() for x, w in zip(xs, ws, strict=True)).split(counts)[rank]
                    close(y, exact + bias.double() + residual.double(), 2 * K, (M, K, N, dtype, splits))
                    if integers:
                        assert same_bits(y, reference(*mine, bias, residual, splits, name())), (M, dtype)


def check_backward(rank, world):
    M, K, N = 13, 10, 6
    counts = rows_of(M, world)
    full, whole = (matrix(i, n, K, torch.float64).requires_grad_() for i, n in enumerate((M, N)))
    factor = matrix(3, M, N, torch.float64)
    ((full @ whole.t()) * factor).sum().backward()
    x = share(full.detach(), rank, world, 1).clone().requires_grad_()
    w = share(whole.detach(), rank, world, 1).clone().requires_grad_()
    bias = torch.zeros(N, dtype=torch.float64, requires_grad=True)
    residual = torch.zeros(counts[rank], N, dtype=torch.float64, requires_grad=True)
    y = pypar.ops.matmul_reduce_scatter(x, w, bias=bias, residual=residual, splits=counts)
    mine = factor.split(counts)[rank]
    (y * mine).sum().backward()
    torch.testing.assert_close(x.grad, share(full.grad, rank, world, 1))
    torch.testing.assert_close(w.grad, share(whole.grad, rank, world, 1))
    torch.testing.assert_close(bias.grad, mine.sum(0))
    torch.testing.assert_close(residual.grad, mine)
    x.requires_grad_(False)
    w.grad = None
    (pypar.ops.matmul_reduce_scatter(x, w, splits=counts) * mine).sum().backward()
    torch.testing.assert_close(w.grad, share(whole.grad, rank, world, 1))


def check_opcheck_and_errors(rank, world):
    x, w = torch.ones(5, 4), torch.ones(3, 4)
    torch.library.opcheck(torch.ops.pypar.matmul_reduce_scatter.default, ([x], [w], None, None, None, name()))
    torch.library.opcheck(
        torch.ops.pypar.all_gather_matmul_both.default,
        (torch.ones(2, 3), torch.ones(2 * world, 4), w, True, True, None, name()),
    )
    with pytest.raises(ValueError, match="K is 4 in x, but 5 in w"):
        torch.ops.pypar.matmul_reduce_scatter([x], [torch.ones(3, 5)], None, None, None, name())
    with pytest.raises(ValueError, match=r"bias is Float\[4\], expected Float\[3\]"):
        torch.ops.pypar.matmul_reduce_scatter([x], [w], torch.ones(4), None, None, name())
    with pytest.raises(ValueError, match=r"residual is Float\[9, 3\]"):
        torch.ops.pypar.matmul_reduce_scatter([x], [w], None, torch.ones(9, 3), None, name())
    with pytest.raises(ValueError, match="0 inputs for 1 weights"):
        torch.ops.pypar.matmul_reduce_scatter([], [w], None, None, None, name())


def check_repeated(rank, world):
    """The same bits in every run, whatever the sizes of the calls in between."""
    x, w = (
        share(matrix(1, 700, 512, torch.float32), rank, world, 1),
        share(matrix(2, 640, 512, torch.float32), rank, world, 1),
    )
    first = torch.ops.pypar.matmul_reduce_scatter([x], [w], None, None, None, name())
    for i in range(20):
        torch.ops.pypar.matmul_reduce_scatter([x[:i]], [w], None, None, None, name())
        assert same_bits(torch.ops.pypar.matmul_reduce_scatter([x], [w], None, None, None, name()), first)


def check(rank, world):
    check_values(rank, world)
    check_backward(rank, world)
    check_opcheck_and_errors(rank, world)
    check_repeated(rank, world)


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_matmul_reduce_scatter(world):
    run_ranks(check, world)
