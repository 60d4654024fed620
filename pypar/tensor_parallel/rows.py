"""Rows of hidden states that the ranks share out, and the ways between a rank's rows and all of them.

The hidden states [B, S, D] are B*S rows; rank r holds sizes[r] of them, consecutive, as [1, sizes[r], D]. All rows on
every rank make a *full* tensor, with the same full gradient on every rank, as exchange.py has it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from pypar import ops
from pypar.tensor_parallel.cut import split_evenly
from pypar.tensor_parallel.shards import Place

_ATTRIBUTE, _TAKEN = "_pypar_rows", "_pypar_rows_taken"


@dataclass(frozen=True, eq=False)
class Rows:
    """How the rows of one forward lie.

    shape       leading dims of the full tensor
    parameters  what the ranks use on their rows
    together    for each SharedInput, the layers that share a gather in this forward
    """

    shape: torch.Size
    sizes: list[int]
    place: Place
    parameters: Sequence[nn.Parameter] = ()
    _sums: dict[int, torch.Tensor] = field(default_factory=dict)
    together: dict[Any, tuple[Any, ...]] = field(default_factory=dict)

    @classmethod
    def of(cls, full: torch.Tensor, place: Place, parameters: Sequence[nn.Parameter]) -> Rows:
        """Of hidden states [..., D]."""
        shape = full.shape[:-1]
        sizes = [stop - start for start, stop in split_evenly(math.prod(shape), place.world_size)]
        return cls(shape, sizes, place, parameters)

    def seen(self, parameter: torch.Tensor) -> torch.Tensor:
        """What to use in its place: the same values, with the gradient summed over the ranks in one message for all of
        `parameters`, when backward has found the last of them; itself where there are no gradients.

        The values are those of now: at stage 3 of ZeRO most parameters come only after the forward has begun.
        """
        if not torch.is_grad_enabled():
            return parameter
        if not self._sums and (wanted := [p for p in self.parameters if p.requires_grad]):
            self._sums.update(zip(map(id, wanted), _SumGradients.apply(self.place.group_name, *wanted), strict=True))
        total = self._sums.get(id(parameter))
        return parameter if total is None else _Values.apply(total, parameter.detach())

    @property
    def num(self) -> int:
        return sum(self.sizes)

    @property
    def mine(self) -> int:
        """Rows of this rank."""
        return self.sizes[self.place.rank]

    @property
    def begin(self) -> int:
        """The first row of this rank."""
        return sum(self.sizes[: self.place.rank])

    def fits(self, x: torch.Tensor) -> bool:
        """x is a rank's rows, as take() gives them."""
        return x.dim() == 3 and x.shape[0] == 1 and x.shape[1] == self.mine

    def take(self, full: torch.Tensor) -> torch.Tensor:
        """[..., D] -> [1, mine, D]; dfull = dx of all ranks' rows."""
        return _Take.apply(full, self)

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        """[1, mine, D] -> [..., D]; dx = this rank's rows of dfull."""
        return _Gather.apply(x, self)


def mark(x: torch.Tensor, rows: Rows) -> torch.Tensor:
    """Remembers on a tensor that it is a rank's rows, for whoever it is handed to."""
    setattr(x, _ATTRIBUTE, rows)
    return x


def rows_of(x: Any) -> Rows | None:
    return getattr(x, _ATTRIBUTE, None)


def note_taken(full: torch.Tensor, rows: Rows) -> None:
    """Remembers on a full tensor how its rows were taken."""
    setattr(full, _TAKEN, rows)


def taken_of(full: torch.Tensor) -> Rows | None:
    return getattr(full, _TAKEN, None)


def _all(x: torch.Tensor, rows: Rows) -> torch.Tensor:
    flat = x.reshape(-1, x.shape[-1])
    every = torch.ops.pypar.all_gather(flat.contiguous(), rows.place.group_name, rows.sizes)
    return every.reshape(*rows.shape, x.shape[-1])


def _own(full: torch.Tensor, rows: Rows) -> torch.Tensor:
    return full.reshape(rows.num, full.shape[-1]).narrow(0, rows.begin, rows.mine)[None]


class _Take(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, full: torch.Tensor, rows: Rows) -> torch.Tensor:
        ctx.rows = rows
        return _own(full, rows).clone()  # not a view: the full tensor can go

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _all(grads[0], ctx.rows), None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, rows: Rows) -> torch.Tensor:
        ctx.rows = rows
        return _all(x, rows)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _own(grads[0], ctx.rows), None


class _SumGradients(torch.autograd.Function):
    """A tensor for each parameter that has its shape and no values; what reaches it is summed over the ranks."""

    @staticmethod
    def forward(ctx: Any, group_name: str, *parameters: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.group_name = group_name
        return tuple(torch.empty((), dtype=p.dtype, device=p.device).expand(p.shape) for p in parameters)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        sums: list[torch.Tensor | None] = [None] * len(grads)
        for dtype in dict.fromkeys(g.dtype for g in grads):
            which = [i for i, g in enumerate(grads) if g.dtype == dtype]
            flat = torch.cat([grads[i].flatten() for i in which])
            torch.ops.pypar.all_reduce_(flat, "sum", ctx.group_name)
            for i, part in zip(which, flat.split([grads[i].numel() for i in which]), strict=True):
                sums[i] = part.view_as(grads[i])
        return None, *sums


class _Values(torch.autograd.Function):
    """`values`, whose gradient goes to `total`."""

    @staticmethod
    def forward(ctx: Any, total: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grads[0], None


class GatheredRows(torch.Tensor):
    """All ranks' rows of x, [..., D], which nobody has gathered yet.

    Column-parallel layers read x itself, with one gather for all of them that works beside their matmuls, and save
    only x for their backward. Whatever else is done to it works on the full tensor, gathered then.
    """

    x: torch.Tensor
    rows: Rows
    full: torch.Tensor | None
    outputs: dict[nn.Module, torch.Tensor]  # of layers that were computed with another one, until they are asked for

    @staticmethod
    def __new__(cls, x: torch.Tensor, rows: Rows, shape: Sequence[int] | None = None) -> GatheredRows:
        size = (*(rows.shape if shape is None else shape), x.shape[-1])
        self = torch.Tensor._make_wrapper_subclass(cls, size, dtype=x.dtype, device=x.device)
        self.x, self.rows, self.full, self.outputs = x, rows, None, {}
        return self

    def gathered(self) -> torch.Tensor:
        if self.full is None:
            self.full = self.rows.gather(self.x)
        return self.full

    def products(self, operands: Sequence[tuple[torch.Tensor, torch.Tensor | None]]) -> list[torch.Tensor]:
        """y_i [..., N_i] = all rows @ w_i.T + b_i."""
        weights, biases = zip(*operands, strict=True)
        flat = self.x.reshape(-1, self.x.shape[-1])
        group_name, sizes = self.rows.place.group_name, self.rows.sizes
        ys = ops.all_gather_matmul(flat, weights, group_name, biases=biases, splits=sizes)
        return [y.reshape(*self.shape[:-1], y.shape[-1]) for y in ys]

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            if func in _ABOUT_THE_TENSOR:
                return func(*args, **kwargs)
            return func(*_gathered(args), **_gathered(kwargs))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        raise NotImplementedError(f"{func} met rows that nobody has gathered; call gathered() first")


def _gathered(value: Any) -> Any:
    if isinstance(value, GatheredRows):
        return value.gathered()
    if isinstance(value, (list, tuple)):
        return type(value)(_gathered(v) for v in value)
    if isinstance(value, dict):
        return {k: _gathered(v) for k, v in value.items()}
    return value


_ABOUT_THE_TENSOR = {
    torch.Tensor.shape.__get__,  # type: ignore[attr-defined]
    torch.Tensor.dtype.__get__,  # type: ignore[attr-defined]
    torch.Tensor.device.__get__,  # type: ignore[attr-defined]
    torch.Tensor.layout.__get__,  # type: ignore[attr-defined]
    torch.Tensor.ndim.__get__,  # type: ignore[attr-defined]
    torch.Tensor.is_cuda.__get__,  # type: ignore[attr-defined]
    torch.Tensor.size,
    torch.Tensor.dim,
    torch.Tensor.numel,
    torch.Tensor.is_floating_point,
    torch.Tensor.element_size,
}
