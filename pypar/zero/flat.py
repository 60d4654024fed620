"""The parameters of a unit as one flat tensor, cut for the ranks, and what a rank keeps of it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import nn

from pypar import ops, symmetric
from pypar.backend import uncompiled
from pypar.ops.zero_gather import Gathering
from pypar.zero.freed import free, restore
from pypar.zero.hosts import Hosts
from pypar.zero.partition import Layout, Piece, lay_out


class FlatParameters:
    """Parameters of one unit that have one dtype and are trained, or not, together.

    full   [numel] all elements. Where the ranks share memory it exists once; else each rank has its own, or the ranks
           of a host have one (hosts), which gather() fills and, unless parameters stay whole, free() empties
    own    this rank's shard: a part of `full`, or by itself where `full` comes and goes
    master own in float32, which the optimizer steps; `own` itself where parameters aren't of a half type
    """

    def __init__(
        self,
        unit: str,
        names: Sequence[str],
        parameters: Sequence[nn.Parameter],
        group: dist.ProcessGroup,
        stays: bool,
        dtype: torch.dtype | None = None,
        hosts: Hosts | None = None,
    ):
        self.unit, self.names, self.parameters = unit, list(names), list(parameters)
        self.group, self.rank, self.world_size = group, dist.get_rank(group), dist.get_world_size(group)
        first = parameters[0]
        self.dtype, self.device = dtype or first.dtype, first.device
        self.layout: Layout = lay_out([p.numel() for p in parameters], self.world_size, self.dtype.itemsize)
        self.shapes = [p.shape for p in parameters]
        self.is_shared = self.world_size > 1 and symmetric.shares_memory(group, self.device)
        self.stays = stays or self.is_shared or self.world_size == 1
        begin, end = self.layout.shard(self.rank)
        self.hosts = hosts if self.device.type == "cpu" else None
        if self.hosts is not None:
            self.full = self.hosts.memory(self.layout, self.dtype)
        elif self.is_shared:
            self.full = symmetric.contiguous(self.layout.shard_sizes(), self.dtype, group)
        else:
            self.full = torch.zeros(self.layout.numel, dtype=self.dtype, device=self.device)
        is_half = self.dtype in (torch.bfloat16, torch.float16)
        with torch.no_grad():
            master = torch.zeros(end - begin, dtype=torch.float32, device=self.device) if is_half else None
            if master is not None:
                for piece in self.layout.pieces(self.rank):
                    master[piece.begin - begin : piece.end - begin].copy_(self._source(piece))
            self._adopt()
        has_own = self.stays or self.hosts is not None
        self.own = self.full[begin:end] if has_own else self.full[begin:end].clone()
        self.master = self.own if master is None else master
        self._bytes = self.full.untyped_storage().nbytes()
        self.is_full = True
        self._gathering: Gathering | None = None  # on its way

    def _adopt(self) -> None:
        """Moves the parameters' values into `full`, and makes the parameters views of it."""
        if self.hosts is not None:
            pieces = [p for rank in self.hosts.brought for p in self.layout.pieces(rank)]
        else:
            pieces = list(self.layout.pieces(self.rank)) if self.is_shared else self._all()
        for piece in pieces:
            self.full[piece.begin : piece.end].copy_(self._source(piece))
        self._point()

    def _source(self, piece: Piece) -> torch.Tensor:
        values = self.parameters[piece.index].detach().reshape(-1)
        return values[piece.start : piece.start + piece.end - piece.begin]

    def _all(self) -> list[Piece]:
        spans = zip(self.layout.offsets, self.layout.sizes, strict=True)
        return [Piece(index, offset, offset + size, 0) for index, (offset, size) in enumerate(spans)]

    def _point(self) -> None:
        for parameter, view in zip(self.parameters, self.views(self.full), strict=True):
            restore(parameter, view)

    def views(self, flat: torch.Tensor) -> list[torch.Tensor]:
        """Of a tensor laid out as `full`, one per parameter."""
        return [
            flat[offset : offset + size].view(shape)
            for offset, size, shape in zip(self.layout.offsets, self.layout.sizes, self.shapes, strict=True)
        ]

    def join(self, shard: torch.Tensor) -> torch.Tensor:
        """[numel] of everybody's shards. Collective."""
        return torch.ops.pypar.all_gather(shard.contiguous(), self.group.group_name, self.layout.shard_sizes())

    @property
    def is_freed(self) -> bool:
        """Neither whole nor on its way."""
        return not self.is_full and self._gathering is None

    @torch.no_grad()
    def start_gather(self) -> None:
        """The parameters are on their way afterwards, where they were not whole. Collective then."""
        if not self.is_freed:
            return
        if self.hosts is not None:
            self._gathering = self.hosts.gather(self.full, self.layout)
            return
        # The storage that tensors saved for backward refer to; its contents don't count as a change.
        self.full.untyped_storage().resize_(self._bytes)
        with torch.autograd._unsafe_preserve_version_counter(self.full):
            self._gathering = ops.zero_gather(self.full, self.own, self.layout.shard_sizes(), self.group, async_op=True)

    @torch.no_grad()
    def gather(self) -> None:
        """The parameters are whole afterwards. Collective, where they were not."""
        self.start_gather()
        gathering, self._gathering = self._gathering, None
        if gathering is None:
            return
        with torch.autograd._unsafe_preserve_version_counter(self.full):
            gathering.wait()
        self._point()
        self.is_full = True

    def free(self) -> None:
        """Gives the memory back where the parameters come and go."""
        if self.stays or self.is_freed:
            return
        gathering, self._gathering = self._gathering, None
        if gathering is not None:
            gathering.wait()
        if self.is_full:
            for name, parameter in zip(self.names, self.parameters, strict=True):
                free(parameter, name)
        self.is_full = False
        if self.hosts is not None:
            self.hosts.let_go(self.full, self.layout)
        else:
            self.full.untyped_storage().resize_(0)

    @torch.no_grad()
    def publish(self) -> None:
        """After `own` has changed: everybody's newest values. Collective where every rank has a whole copy."""
        if not self.stays:
            self.free()  # gathered when it is needed
        elif self.hosts is not None:
            self.hosts.gather(self.full, self.layout).wait()
        elif not self.is_shared and self.world_size > 1:
            ops.zero_gather(self.full, self.own, self.layout.shard_sizes(), self.group)

    def keep(self) -> None:
        """After the whole parameters have changed, by everybody alike: this rank's shard follows."""
        begin, end = self.layout.shard(self.rank)
        mine = self.full[begin:end]
        if self.own.data_ptr() != mine.data_ptr():
            self.own.copy_(mine)
        if self.master is not self.own:  # what did not change keeps the digits that a half type lacks
            self.master.copy_(torch.where(mine == self.master.to(self.dtype), self.master, mine.float()))

    @uncompiled
    def check(self) -> None:
        """The parameters are still where they were put. Raises RuntimeError."""
        home = self.full.untyped_storage()._cdata
        for name, parameter in zip(self.names, self.parameters, strict=True):
            if self.is_full and parameter.untyped_storage()._cdata != home:
                raise RuntimeError(
                    f"pypar.Zero, rank {self.rank}: '{name}' no longer lies where ZeRO keeps it; change a parameter in "
                    "place (parameter.data.copy_), not by assigning .data or a new nn.Parameter, and convert the "
                    "module before it is wrapped"
                )
