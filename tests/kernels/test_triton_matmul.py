"""The fused matmuls in Triton, interpreted, one process for each rank: values. The ranks alone import Triton."""

from __future__ import annotations

import pytest
import torch

from pypar.testing import run_ranks

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
    return sorted({0, 1, world - 1, world, world + 1, 33, 47})


class Case:
    """One problem, the same on every rank: xs[r] [M, K], ws[r] [N, K], bias [N], residual [M, N]."""

    def __init__(self, world, M, N, K, dtype, make=integers, seed=0):
        seed = 1000 * seed + 10 * M
        self.xs = [make(seed + r, (M, K), dtype) for r in range(world)]
        self.ws = [make(seed + 100 + r, (N, K), dtype) for r in range(world)]
        self.bias, self.residual = make(seed + 200, (N,), dtype), make(seed + 201, (M, N), dtype)

    def shares(self):
        return [(x.float() @ w.float().t()).to(x.dtype) for x, w in zip(self.xs, self.ws, strict=True)]


def check_integers(rank, world):
    import triton_matmul_executor as ex

    from pypar.triton_kernels.all_gather_matmul import all_gather_matmul
    from pypar.triton_kernels.matmul_all_reduce import matmul_all_reduce
    from pypar.triton_kernels.matmul_reduce_scatter import matmul_reduce_scatter
    from pypar.triton_kernels.matmul_tile import rows_by_rank

    scatter, reduce, gather = (ex.channel(name, 1 << 16) for name in ("scatter", "reduce", "gather"))
    forms = [(dtype, 45, 37, ex.SMALL) for dtype in DTYPES] + [(torch.bfloat16, 48, 64, ex.WITH_TMA)]
    for i, (dtype, N, K, config) in enumerate(forms):
        for j, M in enumerate(edge_rows(world) if i < 2 else (world + 1, 33)):
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


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_integers_give_the_bits_of_torch(world_size):
    run_ranks(check_integers, world_size)
