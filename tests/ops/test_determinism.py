"""determinism="layout": the same bits on 1, 2, 4 and 8 ranks, forward and backward; the bits of the references."""

import pytest
import torch
from ops.collective_cases import name as world_name
from ops.collective_cases import same_bits
from ops.layout_cases import check_all_worlds, mine, virtual_sizes
from ops.matmul_cases import FLOATS, matrix, rows_of
from ops.vocab_cases import IGNORED, targets

import pypar
from pypar import backend, ops
from pypar.reference import matmul_all_reduce as all_reduce_reference
from pypar.reference import matmul_reduce_scatter as reduce_scatter_reference
from pypar.reference.all_gather_matmul import all_gather_matmul as all_gather_reference
from pypar.reference.all_reduce import all_reduce_shares as shares_reference
from pypar.testing import run_ranks

LAYOUT = {"determinism": "layout"}
# (M, K, N): fewer rows than ranks, fewer k than virtual shards, sizes that 8 doesn't divide; shards of more than one
# block of 256 k; more than one piece of shared memory; rows that don't fit in one.
SHAPES = [(3, 5, 8), (21, 53, 19), (16, 64, 40), (5, 2176, 12), (700, 16, 520), (2, 8, 40000)]


def cases(dtypes=FLOATS):
    return [
        (shape, dtype) for shape in SHAPES for dtype in (dtypes if max(shape) < 1000 and shape[0] < 100 else dtypes[:1])
    ]


def leaf(x: torch.Tensor) -> torch.Tensor:
    return x.detach().clone().requires_grad_()


def row_parallel(rank, world, name):
    """matmul_all_reduce and matmul_reduce_scatter: K is cut."""
    found = {}
    for (M, K, N), dtype in cases():
        x, w = matrix(1, M, K, dtype), matrix(2, N, K, dtype)
        bias, residual, dy = matrix(3, 1, N, dtype)[0], matrix(4, M, N, dtype), matrix(5, M, N, dtype)
        sizes, splits = virtual_sizes(K, world), rows_of(M, world)

        xr, wr, b, res = leaf(mine(x, rank, world, 1)), leaf(mine(w, rank, world, 1)), leaf(bias), leaf(residual)
        y = ops.matmul_all_reduce(xr, wr, name, b, res, sizes=sizes, **LAYOUT)
        y.backward(dy)
        found["all_reduce", M, K, dtype] = {
            ("y", None): y.detach(), ("dx", 1): xr.grad, ("dw", 1): wr.grad, ("db", None): b.grad,
            ("dr", None): res.grad,
        }  # fmt: skip
        raw = [mine(x, rank, world, 1)], [mine(w, rank, world, 1)], bias, residual
        if K < 100 and M < 100:
            assert same_bits(y, all_reduce_reference.matmul_all_reduce(*raw, name, "layout", sizes)), (M, K, dtype)

        xr, wr, b, res = (leaf(t) for t in (xr, wr, b, residual.split(splits)[rank]))
        y = ops.matmul_reduce_scatter(xr, wr, name, b, res, splits, sizes=sizes, **LAYOUT)
        y.backward(dy.split(splits)[rank])
        found["reduce_scatter", M, K, dtype] = {
            ("y", 0): y.detach(), ("dx", 1): xr.grad, ("dw", 1): wr.grad, ("db", "sum"): b.grad, ("dr", 0): res.grad
        }  # fmt: skip
        if K < 100 and M < 100:
            raw = *raw[:3], residual.split(splits)[rank], splits, name, "layout", sizes
            assert same_bits(y, reduce_scatter_reference.matmul_reduce_scatter(*raw)), (M, K, dtype)
    return found


def column_parallel(rank, world, name):
    """all_gather_matmul: N is cut, and M."""
    found = {}
    for (M, N, K), dtype in cases():  # the long dim is N here, over which dx sums
        full, splits = matrix(1, M, K, dtype), rows_of(M, world)
        wholes = [matrix(2 + i, N + 3 * i, K, dtype) for i in range(2)]
        bias, dys = matrix(6, 1, N, dtype)[0], [matrix(7 + i, M, N + 3 * i, dtype) for i in range(2)]
        sizes = [virtual_sizes(w.shape[0], world) for w in wholes]
        x = leaf(full.split(splits)[rank])
        weights, b = [leaf(mine(w, rank, world, 0)) for w in wholes], leaf(mine(bias, rank, world, 0))
        ys = ops.all_gather_matmul(x, weights, name, [b, None], splits, sizes=sizes, **LAYOUT)
        torch.autograd.backward(ys, [mine(dy, rank, world, 1) for dy in dys])
        found[M, N, dtype] = {("dx", 0): x.grad, ("db", 0): b.grad}
        for i in range(2):
            found[M, N, dtype] |= {(f"y{i}", 1): ys[i].detach(), (f"dw{i}", 0): weights[i].grad}
        if max(N, M, K) < 100:
            says = all_gather_reference(full.split(splits)[rank], weights, [b, None], splits, name, "layout")
            assert all(same_bits(y.detach(), s.detach()) for y, s in zip(ys, says, strict=True)), (M, N, dtype)
    return found


def vocabulary(rank, world, name):
    found = {}
    for T, V, K in ((1, 5, 3), (19, 101, 7), (6, 20000, 5)):
        for dtype in FLOATS if V < 1000 else FLOATS[:2]:
            for smoothing in (0.0, 0.1):
                target, sizes = targets(T, V, "some"), virtual_sizes(V, world)
                shared = {"group": name, "sizes": sizes, "label_smoothing": smoothing, **LAYOUT}
                x = leaf(mine(4 * matrix(T, T, V, dtype), rank, world, 1))
                loss, _ = ops.vocab_cross_entropy(x, target, **shared)
                loss.backward()
                hidden, weight = leaf(matrix(1, T, K, dtype)), leaf(mine(matrix(2, V, K, dtype), rank, world, 0))
                linear, _ = ops.linear_vocab_cross_entropy(hidden, weight, target, chunk_rows=7, **shared)
                linear.backward()
                found[T, V, dtype, smoothing] = {
                    ("loss", None): loss.detach(), ("dlogits", 1): x.grad, ("linear loss", None): linear.detach(),
                    ("dhidden", None): hidden.grad, ("dweight", 0): weight.grad,
                }  # fmt: skip
                raw = (x.detach(), target, sizes, IGNORED, smoothing, name)
                wanted, _ = ops.vocab_cross_entropy(x, target, name, sizes, label_smoothing=smoothing)
                torch.testing.assert_close(loss, wanted, rtol=1e-5, atol=1e-5)
                raw_loss = torch.ops.pypar.vocab_cross_entropy(*raw, "layout")[0]
                assert same_bits(raw_loss, loss.detach())
    return found


def shares(rank, world, name):
    found, per = {}, 8 // world
    for shape in ((), (3,), (0, 4), (5, 7), (2, 300, 701)):
        for dtype in FLOATS:
            generator = torch.Generator().manual_seed(1)
            full = torch.randn(8, *shape, generator=generator, dtype=torch.float64).to(dtype)
            x = full[rank * per : (rank + 1) * per]
            y = torch.ops.pypar.all_reduce_shares(x, name)
            assert y.shape == shape and same_bits(y, shares_reference(x, name))
            found[shape, dtype] = {("y", None): y}
    return found


@pytest.mark.parametrize("fn", [row_parallel, column_parallel, vocabulary, shares])
def test_same_bits_on_1_2_4_and_8_ranks(fn):
    check_all_worlds(fn)


def run_level(rank, world, name):
    x, w = (mine(matrix(i, 30, 2176, torch.float32), rank, world, 1) for i in range(2))
    return {"run": {("y", None): ops.matmul_all_reduce(x, w, name)}}


def test_the_comparison_sees_what_layout_is_for():
    with pytest.raises(AssertionError, match="run on 8 ranks: y differs in"):
        check_all_worlds(run_level)


def integers(rank, world):
    """Sums that are exact in any order: both levels, and the references of both, give the same bits."""
    for (M, K, N), dtype in cases(FLOATS[:2]):
        x, w = matrix(1, M, K, dtype, True).remainder(2), matrix(2, N, K, dtype, True).remainder(2)
        if K > 100:
            continue
        args = [mine(x, rank, world, 1)], [mine(w, rank, world, 1)], None, None, world_name()
        run = torch.ops.pypar.matmul_all_reduce(*args)
        assert same_bits(run, torch.ops.pypar.matmul_all_reduce(*args, "layout", virtual_sizes(K, world)))
        assert same_bits(run, all_reduce_reference.matmul_all_reduce(*args))


def mlp(x, w1, w2, sizes, group_name):
    (hidden,) = ops.all_gather_matmul(x, [w1], group_name, sizes=[sizes], **LAYOUT)
    hidden = ops.matmul_reduce_scatter(torch.relu(hidden), w2, group_name, sizes=sizes, **LAYOUT)
    return ops.matmul_all_reduce(hidden, w2, group_name, **LAYOUT)


def compiles(rank, world):
    x, w1, w2 = matrix(rank, 4, 8, torch.float32), matrix(20, 8, 8, torch.float32), matrix(21, 8, 8, torch.float32)
    results = []
    for fn in (mlp, torch.compile(mlp, fullgraph=True, backend="aot_eager")):
        inputs = [t.clone().requires_grad_() for t in (x, w1, w2)]
        y = fn(*inputs, [8] * world, world_name())
        y.square().sum().backward()
        results.append([y.detach(), *(t.grad for t in inputs)])
    assert all(same_bits(a, b) for a, b in zip(*results, strict=True))
    torch.library.opcheck(torch.ops.pypar.matmul_all_reduce.default, ([x], [w1], None, None, world_name(), "layout"))
    torch.library.opcheck(torch.ops.pypar.all_reduce_shares.default, (x.new_ones(8 // world, 3), world_name()))


def wrong_input(rank, world):
    x, w = torch.ones(3, 6), torch.ones(2, 6)
    with pytest.raises(ValueError, match="determinism is 'fast', expected 'run' or 'layout'"):
        ops.matmul_all_reduce(x, w, determinism="fast")
    if world == 3:
        calls = [
            lambda: ops.matmul_all_reduce(x, w, **LAYOUT),
            lambda: ops.matmul_reduce_scatter(x, w, **LAYOUT),
            lambda: ops.all_gather_matmul(leaf(x), [w], **LAYOUT),
            lambda: ops.vocab_cross_entropy(x, torch.tensor([0, 1, 2]), **LAYOUT),
        ]
        for call in calls:
            with pytest.raises(ValueError, match=r"of which 3 ranks can't have whole branches; use 1, 2, 4 or 8 ranks"):
                call()
        return
    fits = (
        r"\[6, 6\] over the ranks.*8 virtual shards, of which each rank has 4: cut it \[8, 4\], or make it a multiple"
    )
    calls = [
        lambda: ops.matmul_all_reduce(x, w, **LAYOUT),
        lambda: ops.matmul_reduce_scatter(x, w, **LAYOUT),
        lambda: ops.all_gather_matmul(leaf(x), [torch.ones(6, 6)], **LAYOUT),
        lambda: ops.vocab_cross_entropy(x, torch.tensor([0, 1, 2]), **LAYOUT),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=f"= 12 is cut {fits} of 8 and cut it evenly, or use determinism 'run'"):
            call()
    with pytest.raises(ValueError, match=f"K is 6 in x on rank {rank}, but sizes says {[8, 4][rank]}"):
        ops.matmul_all_reduce(x, w, sizes=[8, 4], **LAYOUT)
    with pytest.raises(ValueError, match="x has 3 shares on each of 2 ranks, expected 8 in all"):
        torch.ops.pypar.all_reduce_shares(x, world_name())


def various(rank, world):
    if world != 3:
        integers(rank, world)
        compiles(rank, world)
    wrong_input(rank, world) if world in (2, 3) else None


@pytest.mark.parametrize("world", [2, 3, 4])
def test_values_compile_and_errors(world):
    run_ranks(various, world)


def disagree(rank, world):
    x, w = torch.ones(3, 8), torch.ones(2, 8)
    with pytest.raises(pypar.PeerError, match=r"rank 0 called .*sum along a tree.*rank 1 called .*, sum\)"):
        ops.matmul_all_reduce(x, w, determinism="run" if rank else "layout")


@pytest.mark.skipif(not backend.available(), reason="the references don't compare what they are asked")
def test_ranks_that_ask_for_other_levels_are_an_error_on_all():
    run_ranks(disagree, 2)
