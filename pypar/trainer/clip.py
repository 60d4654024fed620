"""Clipping by the one norm of all gradients, whatever part of them a rank holds."""

from __future__ import annotations

import math

import torch
from torch import nn

import pypar
from pypar.tensor_parallel import clip_grad_norm_, counted_elements
from pypar.trainer.layout import Layout


class Clip:
    """Of a module that tensor parallel has cut or not, before ZeRO wraps it."""

    def __init__(self, module: nn.Module, layout: Layout):
        self._module, self._layout = module, layout
        self._counted = counted_elements(module) if layout.tp > 1 else {}

    @torch.no_grad()
    def __call__(self, zero: pypar.Zero | None, max_norm: float) -> float:
        """Scales the gradients so that their norm is at most max_norm; returns what it was, on every rank. A collective
        call of each tp group; with ZeRO, of all ranks."""
        if zero is None:
            return float(clip_grad_norm_(self._module, max_norm))
        if self._layout.tp == 1:
            return zero.optimizer.clip_grad_norm_(max_norm)
        squares = torch.zeros((), dtype=torch.float64)
        for name, start, gradient in zero.optimizer.gradients():
            counted = self._counted[name]
            if isinstance(counted, torch.Tensor):
                gradient = gradient[counted.flatten()[start : start + gradient.numel()]]
            if counted is not False:
                squares += torch.linalg.vector_norm(gradient).double().square()
        torch.distributed.all_reduce(squares, group=self._layout.dp_group)
        torch.distributed.all_reduce(squares, group=self._layout.tp_group)
        norm = math.sqrt(float(squares)) if math.isfinite(float(squares)) else math.nan
        if math.isfinite(norm) and max_norm < norm + 1e-6:
            zero.optimizer.scale_grads(max_norm / (norm + 1e-6))
        return norm
