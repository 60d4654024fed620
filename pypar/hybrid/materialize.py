"""A model on meta, cut by a plan: each rank gets memory and values for its part, a unit of the full model at a time."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import nn

from pypar.hybrid.held import Holding
from pypar.zero.materialize import Init, Materializer, Values, allocate
from pypar.zero.units import Unit, units_of


class PartOfFull(Values):
    """Gives what a plan has left of a model on this rank the values that `init` gives the full model.

    full   the model as it was before the cut, on meta. Its units have values one at a time, on every rank
    cut    the module, or pypar.Pipeline, of this rank
    init   of the full model: see pypar.zero.materialize.Materializer, whose promise holds

    Collective of all ranks of the job. Raises ValueError, on every rank, as Materializer does.
    """

    def __init__(self, full: nn.Module, cut: nn.Module, init: Init | None):
        holding = Holding(cut, None)
        self.full, self.module, self.init, self.places = full, holding.module, init, holding.places

    def run(self, units: list[Unit]) -> Iterator[Unit]:
        """Yields each of `units`, of this rank's module, as soon as its parameters are there."""
        first = {id(p): name for name, p in self.full.named_parameters()}
        named = {name: first[id(p)] for name, p in self.full.named_parameters(remove_duplicate=False)}
        here: dict[str, list[nn.Parameter]] = {}
        for parameter in self.module.parameters():
            here.setdefault(named[self.places[id(parameter)].name], []).append(parameter)
        missing = {id(p) for p in self.module.parameters()}
        waiting = list(units)
        world = dist.group.WORLD
        assert world is not None
        groups = [world] if dist.get_world_size() > 1 else []
        materializer = Materializer(self.full, groups, self.init, "pypar.parallelize")
        for unit in materializer.run(units_of(self.full)):
            for whole in unit.parameters:
                for parameter in here.pop(first[id(whole)], []):
                    self._take(parameter, whole)
                    missing.discard(id(parameter))
                torch.utils.swap_tensors(whole, nn.Parameter(torch.empty_like(whole, device="meta"), False))
            ready = [each for each in waiting if not missing & {id(p) for p in each.parameters}]
            waiting = [each for each in waiting if each not in ready]
            yield from ready
        assert not waiting and not missing
        self._take_buffers()

    @torch.no_grad()
    def _take(self, parameter: nn.Parameter, whole: nn.Parameter) -> None:
        allocate(parameter, whole.device)
        for offsets, view in self.places[id(parameter)].tensor(parameter).held:
            view.copy_(whole[tuple(slice(o, o + n) for o, n in zip(offsets, view.shape, strict=True))])

    def _take_buffers(self) -> None:
        values = dict(self.full.named_buffers(remove_duplicate=False))
        for prefix, module in self.module.named_modules(remove_duplicate=False):
            for name, buffer in module._buffers.items():
                value = values.get(f"{prefix}.{name}" if prefix else name)
                if buffer is not None and value is not None:
                    module._buffers[name] = value.detach().clone()
