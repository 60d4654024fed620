import os

import pytest
import torch
import torch.distributed as dist
from ops.collective_cases import name, same_bits
from ops.matmul_cases import FLOATS, matrix, rows_of
from ops.vocab_cases import IGNORED, SameOnAllRanks, on_all_ranks, own, targets, torch_loss

import pypar
from pypar import backend
from pypar.ops import linear_vocab_cross_entropy, vocab_cross_entropy
from pypar.reference import vocab_cross_entropy as reference
from pypar.testing import run_ranks

# (T, V): no rows, a vocabulary smaller than the ranks (empty shards), odd, shards of more than one block of 1024.
SHAPES = [(0, 7), (1, 1), (1, 3), (2, 17), (19, 101), (5, 4999)]


def check_rounded_once(grad: torch.Tensor, exact: torch.Tensor, what: object) -> None:
    eps = torch.finfo(grad.dtype).eps
    error = (grad.double() - exact).abs()
    allowed = 0.51 * eps * exact.abs() + (1e-14 if grad.dtype == torch.float64 else 1e-6)
    assert grad.shape == exact.shape and not (error > allowed).any(), (what, error.max().item())


def check_values(rank, world):
    for T, V in SHAPES:
        sizes = rows_of(V, world)
        for dtype in FLOATS:
            for ignore, smoothing in (("none", 0.0), ("some", 0.0), ("some", 0.1), ("all", 0.0)):
                what = (T, V, dtype, ignore, smoothing)
                full, target = 4 * matrix(T, T, V, dtype), targets(T, V, ignore)
                wide = full.double().clone().requires_grad_()
                exact = torch_loss(wide, target, smoothing)
                exact.backward()
                exact_grad = own(wide.grad, rank, sizes)
                x = own(full, rank, sizes).clone().requires_grad_()
                args = (target, None, sizes, IGNORED, smoothing)
                loss, count = vocab_cross_entropy(x, *args)
                loss.backward()
                assert count == (target != IGNORED).sum(), what
                eps = torch.finfo(loss.dtype).eps
                torch.testing.assert_close(loss.double(), exact, rtol=64 * eps, atol=64 * eps)
                check_rounded_once(x.grad, exact_grad, what)
                raw = (x.detach(), target, sizes, IGNORED, smoothing, name())
                outs, again = (torch.ops.pypar.vocab_cross_entropy(*raw) for _ in range(2))
                for out, repeated, says in zip(outs, again, reference.vocab_cross_entropy(*raw), strict=True):
                    assert same_bits(out, repeated), ("runs differ", what)
                    on_all_ranks(out, world)
                    torch.testing.assert_close(out, says, rtol=64 * eps, atol=64 * eps)
                dloss = torch.tensor(0.37, dtype=loss.dtype)
                raw = (x.detach(), target, outs[2], dloss, sizes, IGNORED, smoothing, name())
                for dlogits in (torch.ops.pypar.vocab_cross_entropy_dlogits, reference.vocab_cross_entropy_dlogits):
                    check_rounded_once(dlogits(*raw), exact_grad * dloss.double(), what)


def check_layouts(rank, world):
    """Rows that lie apart, columns that lie apart, a target with steps; sizes by default."""
    wide, tall = matrix(1, 6, 5 * world + 3, torch.float32), matrix(1, 5 * world, 6, torch.float32)
    target = targets(6, 5 * world).repeat_interleave(2)[::2]
    for full in (wide[:, : 5 * world], tall.t()):
        x = own(full, rank, [5] * world)
        plain, strided = (
            torch.ops.pypar.vocab_cross_entropy(t, target, None, IGNORED, 0.0, name()) for t in (x.contiguous(), x)
        )
        assert all(same_bits(a, b) for a, b in zip(plain, strided, strict=True))
        torch.testing.assert_close(plain[0].double(), torch_loss(full, target))
        dlogits = [
            torch.ops.pypar.vocab_cross_entropy_dlogits(
                t, target, plain[2], torch.tensor(2.0), None, IGNORED, 0.0, name()
            )
            for t in (x.contiguous(), x)
        ]
        assert same_bits(*dlogits) and dlogits[1].is_contiguous()


def check_extremes(rank, world):
    V = 37
    sizes = rows_of(V, world)
    target = torch.arange(6) * 5
    for dtype in FLOATS:
        huge = (1e4 * matrix(3, 6, V, torch.float64)).to(dtype)
        holes = matrix(4, 6, V, dtype)
        holes[:, 1::2] = -torch.inf  # the loss is infinite where the target is one of them
        shard = matrix(5, 6, V, dtype)
        shard[:, : sizes[0]] = -torch.inf  # all of rank 0
        shard[:, -1] = 1.0
        nothing, nan = torch.full((6, V), -torch.inf, dtype=dtype), torch.full((6, V), torch.nan, dtype=dtype)
        for full in (huge, holes, shard, nothing, nan):
            exact = full.double().clone().requires_grad_()
            expected = torch_loss(exact, target)
            expected.backward()
            x = own(full, rank, sizes).clone().requires_grad_()
            loss, _ = vocab_cross_entropy(x, target, sizes=sizes)
            loss.backward()
            torch.testing.assert_close(loss.double(), expected.detach(), rtol=1e-6, atol=1e-6, equal_nan=True)
            wanted = own(exact.grad, rank, sizes).to(dtype)
            torch.testing.assert_close(x.grad, wanted, equal_nan=True)


def check_gradcheck(rank, world):
    sizes = rows_of(5, world)
    target = torch.tensor([4, IGNORED, 0])
    full = matrix(1, 3, 5, torch.float64).requires_grad_()
    hidden, weight = (matrix(i, n, 2, torch.float64).requires_grad_() for i, n in ((2, 3), (3, 5)))
    for smoothing in (0.0, 0.2):
        shared = (target, None, sizes, IGNORED, smoothing)
        assert torch.autograd.gradcheck(
            lambda x, shared=shared: vocab_cross_entropy(own(SameOnAllRanks.apply(x), rank, sizes), *shared)[0], full
        )
        for chunk_rows in (2, None):
            assert torch.autograd.gradcheck(
                lambda x, w, shared=shared, chunk_rows=chunk_rows: linear_vocab_cross_entropy(
                    x, own(SameOnAllRanks.apply(w), rank, sizes, 0), *shared, chunk_rows=chunk_rows
                )[0],
                (hidden, weight),
            )


def both_losses(x, w, target, group_name):
    whole, count = vocab_cross_entropy(x @ w.t(), target, group_name)
    chunked, _ = linear_vocab_cross_entropy(x, w, target, group_name, chunk_rows=2)
    few, _ = linear_vocab_cross_entropy(x, w, target, group_name)
    return whole / count + chunked - few / 2


def check_compile_and_opcheck(rank, world):
    x, w, target = matrix(1, 5, 4, torch.float32), matrix(2 + rank, 6, 4, torch.float32), targets(5, 6 * world)
    ops = torch.ops.pypar
    stats = ops.vocab_cross_entropy(x @ w.t(), target, None, IGNORED, 0.0, name())[2]
    for op, args in (
        (ops.vocab_cross_entropy, (x @ w.t(), target, None, IGNORED, 0.0)),
        (ops.vocab_cross_entropy_dlogits, (x @ w.t(), target, stats, torch.tensor(1.0), [6] * world, IGNORED, 0.1)),
        (ops.linear_vocab_cross_entropy, (x.bfloat16(), w.bfloat16(), target, None, IGNORED, 0.0, 2, True, True)),
        (ops.linear_vocab_cross_entropy, (x, w, target, None, IGNORED, 0.0, 2, False, False)),
    ):
        torch.library.opcheck(op.default, (*args, name()))
    results = []
    for fn in (both_losses, torch.compile(both_losses, fullgraph=True, backend="aot_eager")):
        inputs = [t.clone().requires_grad_() for t in (x, w)]
        loss = fn(*inputs, target, name())
        loss.backward()
        results.append([loss.detach(), *(t.grad for t in inputs)])
    assert all(same_bits(a, b) for a, b in zip(*results, strict=True))


def check_errors(rank, world):
    x, w, target = torch.ones(3, 4), torch.ones(4, 2), torch.tensor([0, IGNORED, 4 * world - 1])
    V = 4 * world
    for value in (V, -1, 10**12):
        bad = torch.tensor([0, value, 10**13])
        with pytest.raises(
            ValueError, match=rf"target\[1\] is {value}, outside the vocabulary of {V} and not the ignore"
        ):
            vocab_cross_entropy(x, bad)
        with pytest.raises(ValueError, match=rf"target\[1\] is {value}, outside the vocabulary of {V}"):
            linear_vocab_cross_entropy(torch.ones(3, 2), w, bad)
    with pytest.raises(ValueError, match=r"target is Int\[3\], expected Long\[3\]"):
        vocab_cross_entropy(x, target.int())
    with pytest.raises(ValueError, match=r"target is Long\[2\], expected Long\[3\]"):
        vocab_cross_entropy(x, target[:2])
    with pytest.raises(ValueError, match="logits is Long"):
        vocab_cross_entropy(x.long(), target)
    with pytest.raises(ValueError, match=f"sizes has {world + 1} entries for {world} ranks"):
        vocab_cross_entropy(x, target, sizes=[4] * (world + 1))
    with pytest.raises(ValueError, match=f"rank {rank} holds 4 columns of the vocabulary, but sizes says 5"):
        vocab_cross_entropy(x, target, sizes=[5] * world)
    with pytest.raises(ValueError, match=r"label_smoothing is 1.5, expected a number from 0 to 1"):
        vocab_cross_entropy(x, target, label_smoothing=1.5)
    with pytest.raises(ValueError, match="chunk_rows is 0, expected at least 1"):
        linear_vocab_cross_entropy(torch.ones(3, 2), w, target, chunk_rows=0)
    with pytest.raises(ValueError, match="K is 3 in hidden, but 2 in weight"):
        linear_vocab_cross_entropy(torch.ones(3, 3), w, target)


def check(rank, world):
    check_values(rank, world)
    check_layouts(rank, world)
    check_extremes(rank, world)
    check_errors(rank, world)


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_vocab_cross_entropy(world):
    run_ranks(check, world)


def check_instruction_set(rank, world, capability):
    assert backend.extension.cpu_capability() == capability
    check_values(rank, world)
    check_extremes(rank, world)


@pytest.mark.skipif(not backend.available(), reason="needs the compiled extension")
@pytest.mark.parametrize("capability", ["plain", "avx2"])
def test_other_instruction_sets(capability, monkeypatch):
    """The tests above run the best that this machine has."""
    order = ["plain", "avx2", "avx512"]
    if order.index(backend.extension.cpu_capability()) < order.index(capability):
        pytest.skip(f"this processor has no {capability}")
    monkeypatch.setenv("PYPAR_CPU_CAPABILITY", capability)
    run_ranks(check_instruction_set, 2, capability)


def check_second_derivative(rank, world):
    x, w, target = torch.ones(3, 4, requires_grad=True), torch.ones(4, 4, requires_grad=True), torch.tensor([0, 1, 2])
    for loss, _ in (vocab_cross_entropy(x, target), linear_vocab_cross_entropy(x, w, target)):
        (dx,) = torch.autograd.grad(loss.square(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            dx.sum().backward()


def check_autograd(rank, world):
    check_second_derivative(rank, world)
    check_gradcheck(rank, world)
    check_compile_and_opcheck(rank, world)


def test_gradcheck_compile_and_opcheck():
    run_ranks(check_autograd, 2)


def disagree(rank, world):
    x, target = torch.ones(3, 4 + rank), torch.tensor([0, rank, 3])
    for call, what in (
        (lambda: vocab_cross_entropy(x, torch.zeros(3, dtype=torch.int64)), "rank 1 has other sizes of the vocabulary"),
        (
            lambda: vocab_cross_entropy(x[:, :4], target),
            "rank 1 has another target, ignore_index, label_smoothing or determinism",
        ),
        (
            lambda: linear_vocab_cross_entropy(x[:, :4], x[:, :4], target, chunk_rows=2),
            "disagree in linear_vocab_cross_entropy: rank 1 has another target",
        ),
        (
            lambda: vocab_cross_entropy(torch.ones(3 + rank, 4), torch.zeros(3 + rank, dtype=torch.int64)),
            rf"vocab_cross_entropy of {3 + rank} rows on rank {rank}: the ranks .* disagree",
        ),
    ):
        with pytest.raises(pypar.PeerError, match=what):
            call()


@pytest.mark.skipif(not backend.available(), reason="needs the compiled extension")
def test_ranks_that_disagree_are_an_error_on_all():
    run_ranks(disagree, 2)


def over_hosts(rank, world, folder):
    """Each rank on a "host" of its own: the same numbers as on one."""
    os.environ["PYPAR_NODE_ID"] = "ab"[rank]
    dist.init_process_group("pypar", store=dist.FileStore(f"{folder}/store", world), rank=rank, world_size=world)
    hidden, weight, target = matrix(1, 7, 3, torch.float32), matrix(2, 9, 3, torch.float32), targets(7, 9)
    exact = [t.double().clone().requires_grad_() for t in (hidden, weight)]
    expected = torch_loss(exact[0] @ exact[1].t(), target)
    expected.backward()
    sizes = rows_of(9, world)
    for fn in (
        lambda x, w: vocab_cross_entropy(x @ w.t(), target, sizes=sizes),
        lambda x, w: linear_vocab_cross_entropy(x, w, target, sizes=sizes, chunk_rows=3),
    ):
        x, w = hidden.clone().requires_grad_(), own(weight, rank, sizes, 0).clone().requires_grad_()
        loss, _ = fn(x, w)
        loss.backward()
        torch.testing.assert_close(loss.double(), expected.detach(), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(w.grad.double(), own(exact[1].grad, rank, sizes, 0), rtol=1e-5, atol=1e-6)
        on_all_ranks(loss.detach(), world)
    torch.testing.assert_close(x.grad.double(), exact[0].grad, rtol=1e-5, atol=1e-6)


@pytest.mark.skipif(not backend.available(), reason="needs the compiled extension")
def test_over_hosts(tmp_path):
    run_ranks(over_hosts, 2, str(tmp_path), backend="none")
