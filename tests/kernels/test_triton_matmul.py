"""The fused matmuls in Triton, interpreted, one process for each rank: values. The ranks alone import Triton."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from pypar import channel
from pypar.testing import run_ranks
from pypar.triton_kernels import copy_engine

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FP8 = torch.float8_e4m3fn


def integers(seed, shape, dtype=torch.float32):
    return torch.randint(-3, 4, shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def normals(seed, shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def transposed(w):
    return w.t().contiguous().t()


def sum_of(parts, added, activation=""):
    """What the CPU op promises: rounded shares, summed in float32 in rank order, then what is added, one rounding."""
    total = parts[0].float()
    for part in [*parts[1:], *added]:
        if part is not None:
            total = total + part.float()
    act = {"": lambda t: t, "relu": torch.relu, "gelu": torch.nn.functional.gelu, "silu": torch.nn.functional.silu}
    return act[activation](total).to(parts[0].dtype)


def edge_rows(world):
    return sorted({0, 1, world - 1, world, world + 1, 33, 129 if world == 2 else 47})


class Case:
    """One problem, the same on every rank: xs[r] [M, K], ws[r] [N, K], bias [N], residual [M, N]."""

    def __init__(self, world, M, N, K, dtype, make=integers, seed=0):
        seed = 1000 * seed + 10 * M
        self.xs = [make(seed + r, (M, K), dtype) for r in range(world)]
        self.ws = [make(seed + 100 + r, (N, K), dtype) for r in range(world)]
        self.bias, self.residual = make(seed + 200, (N,), dtype), make(seed + 201, (M, N), dtype)

    def shares(self):
        return [(x.float() @ w.float().t()).to(x.dtype) for x, w in zip(self.xs, self.ws, strict=True)]


def test_copies_go_where_the_channel_has_its_slots():
    assert copy_engine.HEADER_WORDS == channel.HEADER_WORDS
    for world in (1, 2, 5, 8):
        at = channel.data_offset(world)
        assert [copy_engine.slot_offset(call, 4096, world, channel.CHUNKS) for call in (4, 5)] == [at, at + 4096]


def check_integers(rank, world):
    import triton_matmul_executor as ex

    from pypar.triton_kernels.all_gather_matmul import all_gather_matmul
    from pypar.triton_kernels.matmul_all_reduce import matmul_all_reduce
    from pypar.triton_kernels.matmul_reduce_scatter import matmul_reduce_scatter
    from pypar.triton_kernels.matmul_tile import rows_by_rank

    scatter, reduce, gather = (ex.channel(name, 1 << 16) for name in ("scatter", "reduce", "gather"))
    forms = [(dtype, 45, 37, ex.SMALL) for dtype in DTYPES] + [(torch.bfloat16, 48, 64, ex.WITH_TMA)]
    for i, (dtype, N, K, config) in enumerate(forms):
        for j, M in enumerate(edge_rows(world) if i == 0 else (world + 1, 33)):
            case = Case(world, M, N, K, dtype)
            x, w = case.xs[rank], case.ws[rank]
            w = transposed(w) if j % 2 else w
            bias, residual = (case.bias, case.residual) if j % 3 else (None, None)
            start = sum(rows_by_rank(M, world, None)[:rank])
            own = slice(start, start + rows_by_rank(M, world, None)[rank])
            want = sum_of(case.shares(), [bias, residual])
            got = matmul_reduce_scatter(
                x,
                w,
                **ex.where(scatter),
                bias=bias,
                residual=None if residual is None else residual[own],
                config=config,
            )
            scatter.check()
            assert torch.equal(got, want[own]), ("matmul_reduce_scatter", dtype, M)
            got = matmul_all_reduce(x, w, **ex.where(reduce), bias=bias, residual=residual, config=config)
            reduce.check()
            assert torch.equal(got, want), ("matmul_all_reduce", dtype, M)
            addresses = gather.pointers.tolist() if j % 2 else None
            got = all_gather_matmul(x, [w], **ex.where(gather), biases=[bias], config=config, addresses=addresses)[0]
            gather.check()
            full = torch.cat(case.xs).float() @ w.float().t()
            assert torch.equal(got, (full + (0 if bias is None else bias.float())).to(dtype)), ("gather", dtype, M)


@pytest.mark.parametrize("world_size", [1, 2, 3, pytest.param(4, marks=pytest.mark.slow)])
def test_integers_give_the_bits_of_torch(world_size):
    run_ranks(check_integers, world_size)


def error(got, want64):
    return (got.double() - want64).abs().max().item() if got.numel() else 0.0


def as_exact_as_torch(got, torchs, want64):
    """Within twice the error of torch's own result in that dtype; both round the same sums, in another order of K."""
    limit = 2 * error(torchs, want64) + 1e-6 * want64.abs().max().item()
    assert error(got, want64) <= limit, (error(got, want64), limit)


def check_normals(rank, world):
    """Returns the bits of what must be the same on every rank."""
    import triton_matmul_executor as ex

    from pypar.triton_kernels import matmul_all_reduce as all_reduce
    from pypar.triton_kernels.matmul_reduce_scatter import matmul_reduce_scatter

    scatter, one_step, two_steps = (ex.channel(name, 1 << 17) for name in ("scatter", "reduce", "reduce in two"))
    M, N, K = 37, 56, 72
    splits = [M - 2 * (world - 1)] + [2] * (world - 1)
    start, same = sum(splits[:rank]), []
    bfloat16, float16 = DTYPES[1:]
    for dtype, activation in ((torch.float32, "gelu"), (bfloat16, ""), (bfloat16, "silu"), (float16, "relu")):
        case = Case(world, M, N, K, dtype, normals, seed=5)
        x, w, own = case.xs[rank], case.ws[rank], slice(start, start + splits[rank])
        torchs = sum_of(case.shares(), [case.bias, case.residual], activation)
        total = sum(a.double() @ b.double().t() for a, b in zip(case.xs, case.ws, strict=True))
        exact = sum_of([total.float()], [case.bias, case.residual], activation).double()
        results = {}
        for config in (ex.SMALL, dataclasses.replace(ex.SMALL, tma=True)):
            y = matmul_reduce_scatter(
                x, w, **ex.where(scatter), bias=case.bias, residual=case.residual[own], splits=splits,
                activation=activation, config=config,
            )  # fmt: skip
            added = {"bias": case.bias, "residual": case.residual, "activation": activation, "config": config}
            whole = all_reduce.matmul_all_reduce(x, w, **ex.where(one_step), **added)
            all_reduce.ONE_STEP_BYTES = 0
            with ex.replaced("flag_tiles_of", lambda of: lambda *args: 2):  # as for more rows than there are flags
                in_two = all_reduce.matmul_all_reduce(x, w, **ex.where(two_steps), **added)
            all_reduce.ONE_STEP_BYTES = 256 * 1024
            for used in (scatter, one_step, two_steps):
                used.check()
            as_exact_as_torch(y, torchs[own], exact[own])
            as_exact_as_torch(whole, torchs, exact)
            assert torch.equal(whole, in_two) and torch.equal(whole[own], y)
            results[config.tma] = whole
        assert torch.equal(results[False], results[True])  # the tiles are the same
        same.append(whole)
    return same


@pytest.mark.parametrize("world_size", [2, 3])
def test_normals_are_as_exact_as_torch_and_the_same_on_all_ranks_and_ways(world_size):
    first, *others = run_ranks(check_normals, world_size)
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def check_gathers(rank, world):
    import triton_matmul_executor as ex

    from pypar.triton_kernels.all_gather_matmul import all_gather_matmul

    gather = ex.channel("gather", 1 << 16)
    outs = []
    for rows in ([5] * world, [0] * (world - 1) + [33], [17, *range(world - 1)], [0] * world):
        for dtype, K in ((torch.float32, 33), (torch.bfloat16, 64), (torch.float32, 0)):
            xs = [normals(r, (n, K), dtype) for r, n in enumerate(rows)]
            ws = [normals(50, (40, K), dtype), transposed(normals(51, (24, K), dtype)), normals(52, (1, K), dtype)]
            biases = [normals(60, (40,), dtype), None, normals(61, (1,), dtype)]
            full = torch.cat(xs)
            for addresses, config in ((None, ex.WITH_TMA), (gather.pointers.tolist(), ex.SMALL)):
                ys = all_gather_matmul(
                    xs[rank], ws, **ex.where(gather), biases=biases, splits=rows, config=config, addresses=addresses
                )
                gather.check()
                for y, w, b in zip(ys, ws, biases, strict=True):
                    exact = full.double() @ w.double().t() + (0 if b is None else b.double())
                    assert y.shape == exact.shape
                    if y.numel():
                        torchs = (full.float() @ w.float().t() + (0 if b is None else b.float())).to(dtype)
                        as_exact_as_torch(y, torchs, exact)
                outs.append(ys)
    return [y for ys in outs for y in ys]


@pytest.mark.parametrize("world_size", [2, 3])
def test_several_weights_share_a_gather_of_uneven_shards(world_size):
    first, *others = run_ranks(check_gathers, world_size)
    for other in others:  # the weights are the same, so the results are
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def check_float8(rank, world):
    import triton_matmul_executor as ex

    from pypar.triton_kernels.all_gather_matmul import all_gather_matmul
    from pypar.triton_kernels.matmul_all_reduce import matmul_all_reduce
    from pypar.triton_kernels.matmul_reduce_scatter import matmul_reduce_scatter

    names = ("scatter", "reduce", "gather")
    scatter, reduce, gather = (ex.channel(name, 1 << 16) for name in names)
    case = Case(world, 6 * world, 48, 64, torch.float32, normals)
    xs, ws = [x.to(FP8) for x in case.xs], [w.to(FP8) for w in case.ws]
    scales = {"x_scale": torch.tensor([0.5]), "w_scale": torch.tensor([3.0])}
    shares = [(x.float() @ w.float().t() * 1.5).bfloat16() for x, w in zip(xs, ws, strict=True)]
    exact = sum(x.double() @ w.double().t() * 1.5 for x, w in zip(xs, ws, strict=True))
    own = slice(6 * rank, 6 * rank + 6)
    got = matmul_reduce_scatter(xs[rank], ws[rank], **ex.where(scatter), **scales, config=ex.SMALL)
    whole = matmul_all_reduce(xs[rank], ws[rank], **ex.where(reduce), **scales, config=ex.WITH_TMA)
    as_exact_as_torch(whole, sum_of(shares, []), exact)
    assert got.dtype == torch.bfloat16 and torch.equal(got, whole[own])
    (y,) = all_gather_matmul(
        xs[rank], [ws[0]], **ex.where(gather), x_scale=scales["x_scale"], w_scales=[scales["w_scale"]],
        out_dtype=torch.float32,
    )  # fmt: skip
    torch.testing.assert_close(y, torch.cat(xs).float() @ ws[0].float().t() * 1.5)
    for used in (scatter, reduce, gather):
        used.check()
    with pytest.raises(ValueError, match="float8 operands come with a scale"):
        matmul_reduce_scatter(xs[rank], ws[rank], **ex.where(scatter))


def test_float8_with_scales():
    run_ranks(check_float8, 2)


def check_refusals(rank, world):
    import triton_matmul_executor as ex

    from pypar.triton_kernels.all_gather_matmul import all_gather_matmul
    from pypar.triton_kernels.matmul_reduce_scatter import matmul_reduce_scatter

    small = ex.channel("small", 4096)
    where, x, w = ex.where(small), torch.ones(64, 8), torch.ones(64, 8)
    for message, arguments, more in (
        ("this call needs 16384", (x, w), {}),
        ("don't fit", (x, w[:, :7]), {}),
        ("got torch.float64", (x.double(), w.double()), {}),
        ("don't cut 64 rows", (x, w), {"splits": [65]}),
        ("activation 'tanh'", (x, w), {"activation": "tanh"}),
        (r"bias is \[63\]", (x, w), {"bias": torch.ones(63)}),
        (r"residual is \[63, 64\]", (x, w), {"residual": torch.ones(63, 64)}),
    ):
        with pytest.raises(ValueError, match=message):
            matmul_reduce_scatter(*arguments, **where, **more)
    with pytest.raises(ValueError, match="has 64 rows, splits says"):
        all_gather_matmul(x, [w], **where, splits=[63])
    with pytest.raises(ValueError, match="don't divide block_m"):
        ex.Config(block_m=24, rows=16)
    small.check()


def test_what_does_not_fit_is_refused_by_name_and_value():
    run_ranks(check_refusals, 1)
