"""What the blocks of a model put out, as a number each, so that a forward that goes wrong is seen where it does."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.utils import _pytree as pytree

from pypar.hybrid import HybridModel
from pypar.placement import cut


class Outputs:
    """found: {block: the sum of the absolute values that it put out while it was watched}, in order."""

    def __init__(self, model: nn.Module):
        """The model as it is before it is shared out; one without a list of blocks has no outputs here."""
        self.found: dict[str, float] = {}
        self._watches = False
        self._stage_of: dict[str, int] = {}
        self._hybrid: HybridModel | None = None
        try:
            blocks = [part for part in cut(model, 1).parts if part.is_block]
        except ValueError:
            blocks = []
        for part in blocks:
            part.module.register_forward_hook(self._hook(part.name))

    def of_stages(self, model: HybridModel) -> None:
        """From now on a block counts where its stage is. (A block that is cut inside counts nowhere.)"""
        self._hybrid = model
        if model.pipeline is not None:
            self._stage_of = {part.name: part.stage for part in model.pipeline.cut.parts if part.is_block}

    @contextmanager
    def watching(self, watches: bool) -> Iterator[None]:
        self._watches = watches
        yield
        self._watches = False

    def joined(self, model: HybridModel) -> dict[str, float]:
        """Over all ranks, in the order of the blocks; the same on every rank. Collective."""
        counts = model.axes.tp_rank == 0 or model.plan.sequence_parallel
        everyone: list[Any] = [None] * model.plan.world_size
        dist.all_gather_object(everyone, self.found if counts else {})
        total: dict[str, float] = {}
        for found in everyone:
            for name, value in found.items():
                total[name] = total.get(name, 0.0) + value
        return dict(sorted(total.items(), key=lambda item: [int(p) if p.isdigit() else 0 for p in item[0].split(".")]))

    def _hook(self, name: str) -> Any:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            if not self._watches or not torch.is_grad_enabled() or torch._C._current_graph_task_id() != -1:
                return  # also a probe's forward, and one that is computed again in backward
            if self._hybrid is not None and self._hybrid.pipeline is not None:
                now = self._hybrid.pipeline._stages.now
                if now is None or self._stage_of.get(name) != now.stage:
                    return
            first = next((x for x in pytree.tree_leaves(output) if isinstance(x, torch.Tensor)), None)
            if first is not None:
                self.found[name] = self.found.get(name, 0.0) + float(first.detach().double().abs().sum())

        return hook
