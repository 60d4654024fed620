"""The tensor that several column-parallel layers of one parent module read."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from pypar.tensor_parallel.rows import GatheredRows

if TYPE_CHECKING:
    from pypar.tensor_parallel.linear import ColumnParallelLinear


class SharedInput:
    """One copy_in, so one all_reduce of dx, for all column layers of one parent module that read the same tensor; or
    one gather, where that tensor is all ranks' rows.

    The layers ask by identity of the tensor, so the result is right whatever the parent does; a layer that reads
    another tensor, or that is called by itself, gets its own. Cleared before and after each forward of the parent.
    """

    def __init__(self, copy_in: Callable[[torch.Tensor], torch.Tensor]):
        self.copy_in = copy_in
        # Those that read one GatheredRows in the last forward; before the first one, all of the parent's.
        self.together: tuple[ColumnParallelLinear, ...] = ()
        self._forget()

    def _forget(self) -> None:
        self.x: torch.Tensor | None = None
        self.copy: torch.Tensor | None = None
        self.version = 0
        self.gathered: GatheredRows | None = None
        self.readers: list[ColumnParallelLinear] = []

    def clear(self, *_: Any) -> None:
        if self.gathered is not None:
            self.together = tuple(self.readers)
        self._forget()

    def attach(self, parent: nn.Module) -> None:
        parent.register_forward_pre_hook(self.clear)
        parent.register_forward_hook(self.clear)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if not x.requires_grad or not torch.is_grad_enabled():
            return self.copy_in(x)
        # Written to since the last layer read it: another tensor. (In a compiled graph versions can't be asked for;
        # there, as in eager mode, writing to what a layer has saved for its backward is an error of its own.)
        version = 0 if torch.compiler.is_compiling() else x._version
        if self.copy is None or self.x is not x or self.version != version:
            self.x, self.version, self.copy = x, version, self.copy_in(x)
        return self.copy

    def matmul(self, layer: ColumnParallelLinear, x: GatheredRows) -> torch.Tensor:
        """y of `layer`, and with the same gather those of the layers that read the same tensor last time."""
        if self.gathered is not x:
            self.gathered, self.readers = x, []
        self.readers.append(layer)
        y = x.outputs.pop(layer, None)
        if y is None:
            # What was learned before this forward: one that is computed again in backward does the same again.
            known = x.rows.together.setdefault(self, self.together)
            layers = [each for each in known if each.in_features == layer.in_features] if layer in known else [layer]
            x.outputs.update(zip(layers, x.products([each.operands() for each in layers]), strict=True))
            y = x.outputs.pop(layer)
        return y
