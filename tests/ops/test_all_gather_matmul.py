import pytest
import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as symm
from ops.collective_cases import name, same_bits
from ops.matmul_cases import FLOATS, SHAPES, close, matrix, rows_of, share

import pypar
from pypar.reference.all_gather_matmul import all_gather_matmul as reference
from pypar.testing import run_ranks


def in_window(x: torch.Tensor, most_rows: int) -> torch.Tensor:
    """x in symmetric memory, at the same place on every rank."""
    t = symm.empty(most_rows, x.shape[1], dtype=x.dtype, device="cpu")
    symm.rendezvous(t, name())
    t[: x.shape[0]].copy_(x)
    return t[: x.shape[0]]


def check_values(rank, world):
    for seed, (M, K, N) in enumerate(SHAPES):
        splits = rows_of(M, world)
        for dtype in FLOATS if M < 3000 else FLOATS[:1]:
            for integers in (True, False):
                full = matrix(seed, M, K, dtype, integers)
                weights = [share(matrix(100 + seed + i, N + i, K, dtype, integers), rank, world, 0) for i in range(3)]
                biases = [None, matrix(9, 1, weights[1].shape[0], dtype, integers)[0], None]
                x = full.split(splits)[rank]
                for symmetric in (False, True):
                    shard = in_window(x, max(1, *splits)) if symmetric else x
                    ys = torch.ops.pypar.all_gather_matmul(shard, weights, biases, splits, name())
                    for y, w, b in zip(ys, weights, biases, strict=True):
                        exact = torch.nn.functional.linear(full.double(), w.double(), None if b is None else b.double())
                        close(y, exact, K, (M, K, N, dtype, symmetric))
                    if integers:
                        want = reference(x, weights, biases, splits, name())
                        assert all(same_bits(a, b) for a, b in zip(ys, want, strict=True)), (M, dtype)


def check_backward(rank, world):
    M, K, N = 13, 6, 10
    splits = rows_of(M, world)
    full = matrix(1, M, K, torch.float64).requires_grad_()
    wholes = [matrix(2 + i, N, K, torch.float64).requires_grad_() for i in range(2)]
    bias = matrix(5, 1, N, torch.float64)[0].requires_grad_()
    factors = [matrix(6 + i, M, N, torch.float64) for i in range(2)]
    outs = [full @ wholes[0].t() + bias, full @ wholes[1].t()]
    sum((y * f).sum() for y, f in zip(outs, factors, strict=True)).backward()

    x = full.detach().split(splits)[rank].clone().requires_grad_()
    weights = [share(w.detach(), rank, world, 0).clone().requires_grad_() for w in wholes]
    b = share(bias.detach(), rank, world, 0).clone().requires_grad_()
    ys = pypar.ops.all_gather_matmul(x, weights, biases=[b, None], splits=splits)
    sum((y * share(f, rank, world, 1)).sum() for y, f in zip(ys, factors, strict=True)).backward()
    torch.testing.assert_close(x.grad, full.grad.split(splits)[rank])
    torch.testing.assert_close(b.grad, share(bias.grad, rank, world, 0))
    for w, whole in zip(weights, wholes, strict=True):
        torch.testing.assert_close(w.grad, share(whole.grad, rank, world, 0))
    # An input that needs no gradient, and one weight of two that does.
    weights[0].requires_grad_(False)
    (y,) = pypar.ops.all_gather_matmul(x.detach(), [weights[1]], splits=splits)
    weights[1].grad = None
    (y * share(factors[1], rank, world, 1)).sum().backward()
    torch.testing.assert_close(weights[1].grad, share(wholes[1].grad, rank, world, 0))


def mlp(x, w1, w2, group_name):
    (hidden,) = pypar.ops.all_gather_matmul(x, [w1], group_name)
    return pypar.ops.matmul_reduce_scatter(torch.nn.functional.gelu(hidden), w2, group_name)


def check_compile_and_opcheck(rank, world):
    x = matrix(rank, 4, 6, torch.float32)
    w1, w2 = matrix(20, 8, 6, torch.float32), matrix(21, 6, 8, torch.float32)
    torch.library.opcheck(torch.ops.pypar.all_gather_matmul.default, (x, [w1, w1], [], None, name()))
    torch.library.opcheck(torch.ops.pypar.all_gather_matmul_dw.default, (x, [x.new_ones(4 * world, 3)], None, name()))
    results = []
    for fn in (mlp, torch.compile(mlp, fullgraph=True, backend="aot_eager")):
        inputs = [t.clone().requires_grad_() for t in (x, w1, w2)]
        y = fn(*inputs, name())
        y.square().sum().backward()
        results.append([y.detach(), *(t.grad for t in inputs)])
    assert all(same_bits(a, b) for a, b in zip(*results, strict=True))


def check_errors(rank, world):
    x, w = torch.ones(3, 4), torch.ones(2, 5)
    with pytest.raises(ValueError, match="K is 4 in x, but 5 in a weight"):
        torch.ops.pypar.all_gather_matmul(x, [w], [], None, name())
    with pytest.raises(ValueError, match="expected Float as the first tensor"):
        torch.ops.pypar.all_gather_matmul(x, [w.double()], [], None, name())
    with pytest.raises(ValueError, match=f"x has 3 rows on rank {rank}, but splits says 2"):
        torch.ops.pypar.all_gather_matmul(x, [w], [], [2] * world, name())
    with pytest.raises(ValueError, match=r"x has shape \[3\], expected a matrix"):
        torch.ops.pypar.all_gather_matmul(torch.ones(3), [w], [], None, name())


def check(rank, world):
    check_values(rank, world)
    check_backward(rank, world)
    check_compile_and_opcheck(rank, world)
    check_errors(rank, world)


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_all_gather_matmul(world):
    run_ranks(check, world)


def disagree(rank, world):
    with pytest.raises(
        pypar.PeerError, match=r"rank 0 called all_gather of rows\(float32\[24\].*rank 1 called .*\[40\]"
    ):
        torch.ops.pypar.all_gather_matmul(torch.ones(3 + 2 * rank, 4), [torch.ones(2, 4)], [], None, name())
    assert dist.get_rank() == rank


def test_ranks_with_other_rows_are_an_error_on_all():
    run_ranks(disagree, 2)
