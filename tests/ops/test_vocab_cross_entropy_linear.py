"""The chunked form, from hidden states and the shard of the weight; what both forms share is tested beside the op."""

import resource

import pytest
import torch
from ops.collective_cases import name, same_bits
from ops.matmul_cases import FLOATS, close, matrix, rows_of
from ops.vocab_cases import IGNORED, on_all_ranks, own, targets, torch_loss

from pypar.ops import linear_vocab_cross_entropy, vocab_cross_entropy
from pypar.reference import vocab_cross_entropy as reference
from pypar.testing import run_ranks


def check_linear(rank, world):
    for T, K, V in ((0, 3, 5), (1, 3, 2), (7, 5, 11), (23, 8, 1500)):
        sizes = rows_of(V, world)
        target = targets(T, V)
        for dtype in FLOATS:
            hidden, weight = matrix(T, T, K, dtype), matrix(V, V, K, dtype)
            exact = [t.double().clone().requires_grad_() for t in (hidden, weight)]
            factor = 0.25
            (torch_loss(exact[0] @ exact[1].t(), target, 0.1) * factor).backward()
            for chunk_rows in (1, 4, 1000, None):
                x, w = hidden.clone().requires_grad_(), own(weight, rank, sizes, 0).clone().requires_grad_()
                loss, count = linear_vocab_cross_entropy(x, w, target, None, sizes, IGNORED, 0.1, chunk_rows)
                (loss * factor).backward()
                what = (T, K, V, dtype, chunk_rows)
                assert count == (target != IGNORED).sum() and x.grad.dtype == w.grad.dtype == dtype, what
                expected = torch_loss(exact[0].detach() @ exact[1].detach().t(), target, 0.1)
                torch.testing.assert_close(
                    loss.double(),
                    expected,
                    rtol=4 * torch.finfo(dtype).eps,
                    atol=1e-6,
                    msg=lambda m, w=what: f"{w} {m}",
                )
                close(x.grad, exact[0].grad, V, what)
                close(w.grad, own(exact[1].grad, rank, sizes, 0), max(T, K), what)
                on_all_ranks(loss.detach(), world)
                on_all_ranks(x.grad, world)
            raw = (hidden, own(weight, rank, sizes, 0), target, sizes, IGNORED, 0.1, 4, True, True, name())
            outs = torch.ops.pypar.linear_vocab_cross_entropy(*raw)
            for out, again in zip(outs, torch.ops.pypar.linear_vocab_cross_entropy(*raw), strict=True):
                assert same_bits(out, again), "runs differ"
            if dtype == torch.float64:
                torch.testing.assert_close(outs, reference.linear_vocab_cross_entropy(*raw))


def check_linear_needs(rank, world):
    """What nobody asked for is not made; autocast computes in its dtype and gives gradients of the weight's."""
    hidden, weight = matrix(1, 9, 4, torch.float32), matrix(2 + rank, 6, 4, torch.float32)
    target = targets(9, 6 * world)

    def run(needs_hidden: bool, needs_weight: bool):
        x, w = hidden.clone().requires_grad_(needs_hidden), weight.clone().requires_grad_(needs_weight)
        loss, _ = linear_vocab_cross_entropy(x, w, target, chunk_rows=2)
        if loss.requires_grad:
            loss.backward()
        return loss, x.grad, w.grad

    loss, dx, dw = run(True, True)
    _, only_dx, none = run(True, False)
    assert none is None and same_bits(dx, only_dx)
    _, none, only_dw = run(False, True)
    assert none is None and same_bits(dw, only_dw)
    with torch.no_grad():
        quiet, *_ = run(True, True)
    assert not quiet.requires_grad and same_bits(loss.detach(), quiet)
    shapes = [
        t.shape
        for t in torch.ops.pypar.linear_vocab_cross_entropy(
            hidden, weight, target, None, IGNORED, 0.0, 2, False, False, name()
        )[2:]
    ]
    assert shapes == [(0, 4), (0, 4)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half, half_dx, half_dw = run(True, True)
    assert half.dtype == half_dx.dtype == half_dw.dtype == torch.float32
    assert not same_bits(half_dx, dx)
    torch.testing.assert_close(half_dx, dx, rtol=0.05, atol=0.05)
    torch.testing.assert_close(half_dw, dw, rtol=0.05, atol=0.05)


def check_memory(rank, world):
    """The logits of all rows, 128 MiB a rank, never exist at once."""
    T, V, K = 8192, 4096, 4
    hidden, weight = matrix(1, T, K, torch.float32).requires_grad_(), matrix(2 + rank, V, K, torch.float32)
    target = targets(T, V * world)

    def growth_mib(fn) -> float:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        fn()[0].backward()
        return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024

    chunked = growth_mib(lambda: linear_vocab_cross_entropy(hidden, weight.requires_grad_(), target, chunk_rows=64))
    assert chunked < 32, chunked
    assert growth_mib(lambda: vocab_cross_entropy(hidden @ weight.t(), target)) > 100, "the measure sees no logits"


def test_memory_of_the_chunked_form():
    run_ranks(check_memory, 2)


def check(rank, world):
    check_linear(rank, world)
    check_linear_needs(rank, world)


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_linear_vocab_cross_entropy(world):
    run_ranks(check, world)
