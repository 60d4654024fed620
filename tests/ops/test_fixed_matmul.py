"""The arithmetic itself: the reference's bits on every instruction set, whatever the shapes, strides and threads."""

import platform

import pytest
import torch
from ops.collective_cases import same_bits
from ops.matmul_cases import FLOATS, close, matrix
from ops.test_instruction_sets import NEEDS, processor_flags

from pypar import backend, ops
from pypar.reference.fixed_matmul import fixed_matmul as reference
from pypar.reference.fixed_matmul import fixed_matmul_shares as shares_reference
from pypar.testing import run_ranks

needs_extension = pytest.mark.skipif(not backend.available(), reason="tests the compiled kernel")

# (M, K, N) around the tiles of every instruction set, the blocks of 256 k, 512 columns, 96 and 1024 rows; and nothing.
SHAPES = [
    *[(0, 3, 4), (3, 0, 4), (3, 4, 0), (1, 1, 1), (5, 7, 17), (6, 255, 64), (13, 257, 65), (97, 5, 33)],
    *[(2, 6, 513), (1030, 3, 5), (3, 513, 7)],
]


def layouts(rows: int, cols: int, dtype: torch.dtype):
    """The same matrix, its rows or its columns next to each other, or neither."""
    x = matrix(rows + 3 * cols, rows, cols, dtype)
    wide = x.new_zeros(rows, 2 * cols)
    wide[:, ::2] = x
    return x, x.t().contiguous().t(), wide[:, ::2]


def check_bits(rank: int, world: int, capability: str) -> None:
    assert backend.extension is not None and backend.extension.cpu_capability() == capability
    for M, K, N in SHAPES:
        for dtype in FLOATS:
            xs, ws, bias = layouts(M, K, dtype), layouts(N, K, dtype), matrix(5, 1, N, dtype)[0]
            want = reference(xs[0], ws[0], bias)
            for x, w in zip(xs, (ws[2], *ws[:2]), strict=True):
                assert same_bits(torch.ops.pypar.fixed_matmul(x, w, bias), want), (M, K, N, dtype, x.stride())
            sizes = [K // 3, 0, K - K // 3, 0, K, 0]
            got = torch.ops.pypar.fixed_matmul_shares([xs[1], xs[0]], [ws[0], ws[1]], sizes)
            assert same_bits(got, shares_reference([xs[0]] * 2, [ws[0]] * 2, sizes)), (M, K, N, dtype)


@needs_extension
@pytest.mark.skipif(platform.machine() != "x86_64", reason="other instruction sets are built for x86-64 only")
@pytest.mark.parametrize("capability", ["plain", "avx2", "avx512"])
def test_bits_are_those_of_the_reference(capability, monkeypatch):
    missing = NEEDS[capability] - processor_flags()
    if missing:
        pytest.skip(f"this processor lacks {', '.join(sorted(missing))}")
    monkeypatch.setenv("PYPAR_CPU_CAPABILITY", capability)
    run_ranks(check_bits, 1, capability)  # the processor is asked once per process


@needs_extension
def test_an_element_does_not_depend_on_the_others():
    x, w = matrix(1, 200, 600, torch.float32), matrix(2, 700, 600, torch.float32)
    whole = ops.fixed_matmul(x, w)
    threads = torch.get_num_threads()
    try:
        for rows, cols, num in ((slice(0, 1), slice(3, 4), 1), (slice(7, 150), slice(1, 640), 2), (..., ..., 3)):
            torch.set_num_threads(num)
            assert same_bits(ops.fixed_matmul(x[rows], w[cols]), whole[rows][..., cols]), (rows, cols, num)
    finally:
        torch.set_num_threads(threads)


def test_values_and_gradients():
    for dtype in FLOATS:
        x, w = matrix(1, 33, 300, dtype), matrix(2, 9, 300, dtype)
        close(ops.fixed_matmul(x, w), x.double() @ w.double().t(), 300, dtype)
    inputs = [matrix(3, 4, 5, torch.float64), matrix(4, 6, 5, torch.float64), matrix(5, 1, 6, torch.float64)[0]]
    assert torch.autograd.gradcheck(ops.fixed_matmul, [t.requires_grad_() for t in inputs])


def test_special_numbers_stay_in_their_row_and_column():
    x, w = torch.ones(9, 300), torch.ones(11, 300)
    x[4, 7], w[3, 0] = float("nan"), float("inf")
    y = ops.fixed_matmul(x, w)
    want = torch.full((9, 11), 300.0)
    want[:, 3], want[4] = float("inf"), float("nan")
    torch.testing.assert_close(y, want, rtol=0, atol=0, equal_nan=True)


def test_opcheck_compile_and_errors():
    x, w = matrix(1, 4, 6, torch.float32), matrix(2, 3, 6, torch.float32)
    torch.library.opcheck(torch.ops.pypar.fixed_matmul.default, (x, w, x.new_ones(3)))
    torch.library.opcheck(torch.ops.pypar.fixed_matmul_shares.default, ([x], [w], [2, 4]))
    results = []
    for fn in (ops.fixed_matmul, torch.compile(ops.fixed_matmul, fullgraph=True, backend="aot_eager")):
        inputs = [t.clone().requires_grad_() for t in (x, w)]
        y = fn(*inputs)
        y.square().sum().backward()
        results.append([y.detach(), *(t.grad for t in inputs)])
    assert all(same_bits(a, b) for a, b in zip(*results, strict=True))
    if backend.available():
        with pytest.raises(ValueError, match="K is 6 in x, but 5 in w"):
            torch.ops.pypar.fixed_matmul(x, w[:, :5])
        with pytest.raises(ValueError, match="expected Float as the first tensor"):
            torch.ops.pypar.fixed_matmul(x, w.double())
        with pytest.raises(ValueError, match=r"K is 6 in x, but \[2, 5\] sum to 7"):
            torch.ops.pypar.fixed_matmul_shares([x], [w], [2, 5])
