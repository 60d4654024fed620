from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from pypar.ops.library import define
from pypar.reference.keyed_dropout import keyed_dropout as reference

define(
    "keyed_dropout(Tensor x, Tensor seed, int site, float p, int dim, SymInt full, SymInt[] ranges) -> Tensor",
    reference,
    lambda x, *_: torch.empty_like(x, memory_format=torch.contiguous_format),
)


class _KeyedDropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, seed: torch.Tensor, key: tuple[Any, ...]) -> torch.Tensor:
        ctx.save_for_backward(seed)
        ctx.key = key
        return torch.ops.pypar.keyed_dropout(x, seed, *key)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return _KeyedDropout.apply(grads[0], *ctx.saved_tensors, ctx.key), None, None


def keyed_dropout(
    x: torch.Tensor,
    seed: torch.Tensor | int,
    site: int,
    p: float,
    dim: int = 0,
    full: int | None = None,
    ranges: Sequence[int] | None = None,
) -> torch.Tensor:
    """y[i] = x[i] / (1 - p) if word(seed, site, i) >= p * 2^32, else 0, where i is the index in the full tensor.

    So that ranks that hold parts of one tensor, however it is cut, drop the elements that one process would drop.

    Shapes         x any shape, y as x, contiguous. x holds the indices of `ranges` (start, stop, start, stop, ...) of
                   `dim` of a tensor that has `full` indices there; both None: x is the full tensor. seed int64 [], on
                   the CPU, or an int; site: any int64, one per place in the model where dropout happens
    Backward       dx = keyed_dropout(dy) with the same key: the mask is found again, and there is a second derivative
    Communicates   nothing
    Saves          the seed
    Concurrency    none to mind
    Numerics       float32 (float64 for float64), rounded once; dropped elements are 0, whatever x has there. p is
                   rounded down to a multiple of 2^-32. The same bits from every number of threads and instruction set
    Raises         ValueError: p outside [0, 1], ranges that don't fit x
    Source         Salmon et al., Parallel random numbers: as easy as 1, 2, 3 (2011): Philox 4x32-10, counter = (index
                   // 4, site), key = seed, word index % 4
    """
    if isinstance(seed, int):
        seed = torch.tensor(seed, dtype=torch.int64)
    shape = x.shape
    if not shape:
        x = x.reshape(1)
    dim %= x.dim()
    if full is None or ranges is None:
        full, ranges = x.shape[dim], (0, x.shape[dim])
    return _KeyedDropout.apply(x, seed, (site, p, dim, full, list(ranges))).reshape(shape)
