"""Activations that are computed again in backward, block by block."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from pypar.placement import cut


def recompute_blocks(module: nn.Module) -> None:
    """From now on, in training, each block of the module keeps its inputs alone for backward.

    Raises ValueError where the module has no list of blocks."""
    for part in cut(module, 1).parts:
        if part.is_block:
            part.module.__class__ = _class(type(part.module))  # type: ignore[assignment,arg-type]


@functools.cache
def _class(kind: type[nn.Module]) -> type[nn.Module]:
    """A class with the name and all else of `kind`, but for its call."""

    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        plain = functools.partial(kind.__call__, self)
        if not (self.training and torch.is_grad_enabled()):
            return plain(*args, **kwargs)
        return checkpoint(plain, *args, use_reentrant=False, **kwargs)

    return type(kind.__name__, (kind,), {"__call__": call, "__module__": kind.__module__})
