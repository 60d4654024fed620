"""The parameters of a unit as one flat tensor, cut for the ranks, and what a rank keeps of it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import nn

from pypar import symmetric
from pypar.zero.partition import Layout, Piece, lay_out


class FlatParameters:
    """Parameters of one unit that have one dtype and are trained, or not, together.

    full   [numel] all elements. Where the ranks share memory it exists once, and full holds everybody's newest values
           after publish(); else each rank has its own, which gather() fills
    own    this rank's shard of it: a view of `full` where memory is shared or parameters stay whole (stages 1 and 2),
           else all that stays when `full` is freed
    """

    def __init__(self, unit: str, names: Sequence[str], parameters: Sequence[nn.Parameter], group: dist.ProcessGroup):
        self.unit, self.names, self.parameters = unit, list(names), list(parameters)
        self.group, self.rank, self.world_size = group, dist.get_rank(group), dist.get_world_size(group)
        first = parameters[0]
        self.dtype, self.device = first.dtype, first.device
        self.layout: Layout = lay_out([p.numel() for p in parameters], self.world_size, first.element_size())
        self.is_shared = self.world_size > 1 and symmetric.shares_memory(group, self.device)
        begin, end = self.layout.shard(self.rank)
        if self.is_shared:
            self.full = symmetric.contiguous(self.layout.shard_sizes(), self.dtype, group)
        else:
            self.full = torch.zeros(self.layout.numel, dtype=self.dtype, device=self.device)
        self.own = self.full[begin:end]
        with torch.no_grad():
            self._adopt()

    def _adopt(self) -> None:
        """Moves the parameters' values into `full`, and makes the parameters views of it."""
        for piece in self.layout.pieces(self.rank) if self.is_shared else self._all():
            source = self.parameters[piece.index].detach().reshape(-1)
            self.full[piece.begin : piece.end].copy_(source[piece.start : piece.start + piece.end - piece.begin])
        for parameter, view in zip(self.parameters, self.views(self.full), strict=True):
            parameter.data = view

    def _all(self) -> list[Piece]:
        return [Piece(i, o, o + n, 0) for i, (o, n) in enumerate(zip(self.layout.offsets, self.layout.sizes, strict=True))]

    def views(self, flat: torch.Tensor) -> list[torch.Tensor]:
        """Of a tensor laid out as `full`, one per parameter."""
        return [
            flat[offset : offset + size].view(parameter.shape)
            for offset, size, parameter in zip(self.layout.offsets, self.layout.sizes, self.parameters, strict=True)
        ]

    def shards(self, flat: torch.Tensor) -> list[torch.Tensor]:
        """Of a tensor laid out as `full`, one per rank."""
        bounds = self.layout.bounds
        return [flat[a:b] for a, b in zip(bounds, bounds[1:], strict=False)]

    def gather(self) -> None:
        """Fills `full` from everybody's `own`; nothing to do where it is shared."""
        if not self.is_shared and self.world_size > 1:
            self.full.copy_(self.join(self.own))

    def join(self, shard: torch.Tensor) -> torch.Tensor:
        """[numel] of everybody's shards. Collective."""
        return torch.ops.pypar.all_gather(shard.contiguous(), self.group.group_name, self.layout.shard_sizes())

    def check(self) -> None:
        """The parameters are still where they were put. Raises RuntimeError."""
        item, start = self.full.element_size(), self.full.data_ptr()
        for name, parameter, offset in zip(self.names, self.parameters, self.layout.offsets, strict=True):
            if parameter.data_ptr() != start + offset * item and parameter.numel():
                raise RuntimeError(
                    f"pypar.Zero, rank {self.rank}: '{name}' no longer lies where ZeRO keeps it; change a parameter in "
                    "place (parameter.data.copy_), not by assigning .data or a new nn.Parameter, and convert the "
                    "module before it is wrapped"
                )
