from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from pypar.ops.library import define
from pypar.reference.fixed_matmul import fixed_matmul as reference
from pypar.reference.fixed_matmul import fixed_matmul_shares as shares_reference

define(
    "fixed_matmul(Tensor x, Tensor w, Tensor? bias=None) -> Tensor",
    reference,
    lambda x, w, bias=None: x.new_empty(x.shape[0], w.shape[0]),
)
define(
    "fixed_matmul_shares(Tensor[] xs, Tensor[] weights, SymInt[] sizes) -> Tensor",
    shares_reference,
    lambda xs, weights, sizes: xs[0].new_empty(len(sizes) // len(xs), xs[0].shape[0], weights[0].shape[0]),
)


def fixed_row_sum(x: torch.Tensor) -> torch.Tensor:
    """The sum of the rows of x, as fixed_matmul sums: x.sum(0) has other bits for other numbers of columns."""
    return torch.ops.pypar.fixed_matmul(x.new_ones(1, x.shape[0]), x.t())[0]


def fixed_grads(
    dy: torch.Tensor, x: torch.Tensor, w: torch.Tensor, needs: Sequence[bool]
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """dx, dw, dbias of y = x @ w.T + bias, those that are needed."""
    return (
        torch.ops.pypar.fixed_matmul(dy, w.t()) if needs[0] else None,
        torch.ops.pypar.fixed_matmul(dy.t(), x.t()) if needs[1] else None,
        fixed_row_sum(dy) if needs[2] else None,
    )


class _FixedMatmul(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(x, w)
        return torch.ops.pypar.fixed_matmul(x, w, bias)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, w = ctx.saved_tensors
        return fixed_grads(grads[0], x, w, ctx.needs_input_grad)


def fixed_matmul(x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """y = x @ w.T + bias, of which an element's bits depend on its row of x, its row of w and its bias alone.

    Not on how many rows there are, where they lie, on threads or the instruction set: what determinism "layout" of the
    parallel matmuls is made of. No rank is asked.

    Shapes         x [M, K], w [N, K], bias [N], y [M, N]; any strides
    Backward       dx = dy @ w, dw = dy.T @ x, dbias = the sum of the rows of dy, by the same arithmetic
    Communicates   nothing
    Saves          x, w
    Numerics       float32 for half types, else the type itself. In blocks of 256 k, from 0.0 in the order of k:
                   sum = sum + x * w, product and sum rounded each; the blocks' sums are added in order; then bias, one
                   rounding. Speed against torch.mm: docs/design/0005-layout-determinism.md
    Raises         ValueError: shapes or dtypes that don't fit
    Source         register tiles over packed panels: Goto and van de Geijn, Anatomy of High-Performance Matrix
                   Multiplication (2008)
    """
    return _FixedMatmul.apply(x, w, bias)
