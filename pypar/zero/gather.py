"""Stage 3 between ranks that share no memory: a unit's parameters are whole while it computes, and gone otherwise."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from pypar.zero.flat import FlatParameters


class UnitHooks:
    """On the module of a unit. stays: until backward has passed it (the root's, which is needed all the time)."""

    def __init__(self, flats: list[FlatParameters], stays: bool):
        self.flats, self.stays = flats, stays

    def attach(self, module: nn.Module) -> None:
        module.register_forward_pre_hook(self.enter)
        module.register_forward_hook(self.leave)

    def gather(self, *_: Any) -> None:
        for flat in self.flats:
            flat.gather()

    def free(self) -> None:
        for flat in self.flats:
            flat.free()

    def enter(self, _module: nn.Module, _args: Any) -> None:
        self.gather()

    def leave(self, _module: nn.Module, _args: Any, output: Any) -> None:
        in_backward = torch._C._current_graph_task_id() != -1  # computed again, for the backward that comes next
        needs_backward = False
        for leaf in pytree.tree_leaves(output):
            if isinstance(leaf, torch.Tensor) and leaf.requires_grad:
                needs_backward = True
                if not in_backward:
                    leaf.register_hook(self.gather)
        if not in_backward and not (self.stays and needs_backward):
            self.free()
