"""Weight gradients that can wait: what the zero-bubble schedules call W.

A linear layer's backward is two matmuls. The one for its input is wanted by the stage before, the one for its weight by
nobody until the step ends, so a schedule may put it where the rank would idle. It always runs here, through the same
code, whether at once or later: that is why schedules that only reorder give the same bits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from pypar.gradients.buckets import place_of

Key = tuple[int, int]  # (stage, micro-batch)


class WeightQueue:
    """Matmuls that backward left for later, in its order, by stage and micro-batch."""

    def __init__(self) -> None:
        self._tasks: dict[Key, list[Callable[[], None]]] = {}
        self._key: Key | None = None  # that backward is busy with, if its weight gradients wait

    def defer(self, key: Key | None) -> None:
        """Until the next call, weight gradients wait under `key`; None: they are computed at once."""
        self._key = key
        if key is not None:
            self._tasks[key] = []

    def do(self, task: Callable[[], None]) -> None:
        if self._key is None:
            task()
        else:
            self._tasks[self._key].append(task)

    def run(self, key: Key) -> None:
        for task in self._tasks.pop(key):
            task()

    def clear(self) -> None:
        self._tasks.clear()
        self._key = None


def attach(module: nn.Module, queue: WeightQueue, second: set[int]) -> None:
    """Makes the linear layers in `module` compute their weight gradients through the queue.

    second: ids of parameters that another module uses before; their gradients from here are kept apart in
    `parameter._pypar_second_grad`, to be added when all are there: in one order, whenever they were computed.
    """
    for layer in module.modules():
        is_conv = type(layer).__name__ == "Conv1D" and hasattr(layer, "nf")  # transformers': [in, out]
        if (type(layer) is nn.Linear or is_conv) and layer.weight.requires_grad:
            apart = id(layer.weight) in second
            layer.forward = _forward(layer, queue, is_conv, apart)  # type: ignore[method-assign,assignment]
        elif hasattr(type(layer), "weight_gradient") and layer.weight.requires_grad:  # tensor parallel's
            layer.weight_gradient = _late(layer, queue, id(layer.weight) in second)  # type: ignore[assignment]


def _late(layer: Any, queue: WeightQueue, apart: bool) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    def late(y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return _Late.apply(y, x, layer.weight, layer, queue, apart)

    return late


class _Late(torch.autograd.Function):
    """y, made of x and a weight that its own graph does not know."""

    @staticmethod
    def forward(
        ctx: Any, y: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, layer: Any, queue: WeightQueue, apart: bool
    ) -> torch.Tensor:
        ctx.save_for_backward(x)
        ctx.parameter, ctx.transposed, ctx.queue, ctx.apart = layer.weight, layer.transposed, queue, apart
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        dy = grads[0].reshape(-1, grads[0].shape[-1])  # [M, N]
        rows = x.reshape(-1, x.shape[-1])  # [M, K]
        a, b = (rows, dy) if ctx.transposed else (dy, rows)
        parameter, apart = ctx.parameter, ctx.apart
        ctx.queue.do(lambda: _accumulate(parameter, a, b, apart))
        return grads[0], None, None, None, None, None


def _forward(layer: Any, queue: WeightQueue, is_conv: bool, apart: bool) -> Callable[[torch.Tensor], torch.Tensor]:
    def forward(input: torch.Tensor) -> torch.Tensor:
        weight, bias = layer.weight, layer.bias
        if not torch.is_grad_enabled() or input.dtype != weight.dtype or torch.is_autocast_enabled(input.device.type):
            weight = weight.t() if is_conv else weight
            return F.linear(input, weight, bias)
        return _Linear.apply(input, weight, bias, layer, queue, is_conv, apart)

    return forward


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, layer: Any, queue: WeightQueue,
        is_conv: bool, apart: bool,
    ) -> torch.Tensor:  # fmt: skip
        ctx.save_for_backward(x, weight)
        ctx.parameter = layer.weight  # under a checkpoint the saved one is another object
        ctx.queue, ctx.is_conv, ctx.apart = queue, is_conv, apart
        return F.linear(x, weight.t() if is_conv else weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        dy = grads[0].reshape(-1, grads[0].shape[-1])  # [M, N]
        rows = x.reshape(-1, x.shape[-1])  # [M, K]
        dx = dy.mm(weight.t() if ctx.is_conv else weight).view(x.shape) if ctx.needs_input_grad[0] else None
        if ctx.needs_input_grad[1]:
            a, b = (rows, dy) if ctx.is_conv else (dy, rows)
            parameter, apart = ctx.parameter, ctx.apart
            ctx.queue.do(lambda: _accumulate(parameter, a, b, apart))
        return dx, None, dy.sum(0) if ctx.needs_input_grad[2] else None, None, None, None, None


@torch.no_grad()
def _accumulate(weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, apart: bool) -> None:
    """grad += a.T @ b"""
    grad = getattr(weight, "_pypar_second_grad", None) if apart else weight.grad
    if grad is not None:
        grad.addmm_(a.t(), b)
        return
    place = None if apart else place_of(weight)
    grad = a.t().mm(b) if place is None else torch.mm(a.t(), b, out=place)
    if apart:
        weight._pypar_second_grad = grad  # type: ignore[attr-defined]
    else:
        weight.grad = grad
