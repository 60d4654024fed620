"""One true norm of the gradients, over every axis: each element of the full model counted on one rank."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import nn

from pypar.hybrid.axes import Axes
from pypar.tensor_parallel import counted_elements
from pypar.zero import Zero


class Norm:
    """Of a module that tensor parallel and the pipeline have cut, before ZeRO wraps it. copies: ids of parameters that
    another rank of the pipeline counts."""

    def __init__(self, module: nn.Module, axes: Axes, copies: set[int]):
        self._module, self._axes = module, axes
        self._counted: dict[str, bool | torch.Tensor] = counted_elements(module) if axes.tp > 1 else {}
        for name, parameter in module.named_parameters():
            if id(parameter) in copies:
                self._counted[name] = False

    @torch.no_grad()
    def __call__(self, zero: Zero | None) -> float:
        """The same on every rank; inf or nan where some gradient has one. Collective of all ranks."""
        squares = torch.zeros((), dtype=torch.float64)
        if zero is None:
            for name, parameter in self._module.named_parameters():
                if parameter.grad is not None:
                    squares += self._square(name, parameter.grad, 0)
        else:
            for name, start, gradient in zero.optimizer.gradients():
                squares += self._square(name, gradient, start)
            if self._axes.dp > 1:
                dist.all_reduce(squares, group=zero.group)
        for group in (self._axes.tp_group, self._axes.pp_group):
            if group is not None:
                dist.all_reduce(squares, group=group)
        return math.sqrt(float(squares))

    def _square(self, name: str, gradient: torch.Tensor, start: int) -> torch.Tensor:
        """gradient: whole, or, flat, of the elements from `start`."""
        counted = self._counted.get(name, True)
        if counted is False:
            return torch.zeros((), dtype=torch.float64)
        if isinstance(counted, torch.Tensor):
            flat = gradient.reshape(-1)
            gradient = flat[counted.flatten()[start : start + flat.numel()]]
        return (
            torch.linalg.vector_norm(gradient, dtype=torch.promote_types(gradient.dtype, torch.float32)).double() ** 2
        )
