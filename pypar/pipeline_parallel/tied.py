"""Parameters that several stages hold: their gradients are added up, in the order of the model's parts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from pypar.gradients.buckets import set_aside
from pypar.placement import Cut, Part


@dataclass
class Tied:
    """A parameter of several parts (an embedding that is the head's weight as well), or of all stages.

    name: by which the model knows it first. parts: those that use it, in order; empty where every stage does. ranks:
    that hold it, in that order. parameter: here, where this rank is one of them.
    """

    name: str
    parts: list[str]
    ranks: list[int]
    parameter: nn.Parameter | None

    def is_copy(self, rank: int) -> bool:
        """Whether another rank's counts, in a norm for example."""
        return rank != self.ranks[0]


def find_tied(root: nn.Module, cut: Cut, rank_of: Any, num_ranks: int, rank: int) -> list[Tied]:
    """Before anything is stripped."""
    owners: dict[int, list[Part]] = {}
    for part in cut.parts:
        for parameter in dict.fromkeys(part.module.parameters()):
            owners.setdefault(id(parameter), []).append(part)
    names: dict[int, tuple[str, nn.Parameter]] = {}
    for name, parameter in root.named_parameters():
        names[id(parameter)] = (name, parameter)
    found = []
    for key, (name, parameter) in names.items():
        parts = owners.get(key, [])
        if len(parts) > 1:
            ranks = list(dict.fromkeys(rank_of(part.stage) for part in parts))
            found.append(Tied(name, [p.name for p in parts], ranks, parameter if rank in ranks else None))
        elif not parts and num_ranks > 1:
            found.append(Tied(name, [], list(range(num_ranks)), parameter))
    return found


class TiedGradients:
    """Around a step: before it, what is there already is set aside; behind it, everybody's are added up."""

    def __init__(self, tied: list[Tied], group: dist.ProcessGroup):
        self.tied, self.group, self.rank = tied, group, dist.get_rank(group)
        self._before: list[torch.Tensor | None] = []

    def begin(self) -> None:
        self._before = []
        for each in self.tied:
            parameter = each.parameter
            self._before.append(None if parameter is None else set_aside(parameter))
            if parameter is not None:
                parameter.__dict__.pop("_pypar_second_grad", None)

    @torch.no_grad()
    def end(self) -> None:
        for each, before in zip(self.tied, self._before, strict=True):
            parameter = each.parameter
            if parameter is None or not parameter.requires_grad:
                continue
            second = parameter.__dict__.pop("_pypar_second_grad", None)
            total: torch.Tensor | None = None
            for share in self._shares(each, parameter, [g for g in (parameter.grad, second) if g is not None]):
                total = share if total is None else total + share
            if before is not None:
                total = before if total is None else before + total
            parameter.grad = total
        self._before = []

    def _shares(self, each: Tied, parameter: nn.Parameter, mine: list[torch.Tensor]) -> list[torch.Tensor]:
        """Of every rank that holds it, in their order. Each sends two at most."""
        if len(each.ranks) == 1:
            return mine
        others = [r for r in each.ranks if r != self.rank]
        counts = torch.tensor([len(mine)])
        theirs = {r: torch.zeros(1, dtype=torch.int64) for r in others}
        self._exchange({r: [counts] for r in others}, {r: [theirs[r]] for r in others})
        buffers = {r: [torch.empty_like(parameter) for _ in range(int(theirs[r]))] for r in others}
        self._exchange({r: [g.contiguous() for g in mine] for r in others}, buffers)
        return [share for r in each.ranks for share in (mine if r == self.rank else buffers[r])]

    def _exchange(self, out: dict[int, list[torch.Tensor]], into: dict[int, list[torch.Tensor]]) -> None:
        works = [dist.isend(x, group=self.group, group_dst=r) for r, xs in out.items() for x in xs]
        works += [dist.irecv(x, group=self.group, group_src=r) for r, xs in into.items() for x in xs]
        for work in works:
            if work is not None:
                work.wait()
