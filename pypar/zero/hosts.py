"""Parameters that exist once per host, where ranks are on several: each rank brings its part from the other hosts."""

from __future__ import annotations

import torch
import torch.distributed as dist

from pypar import symmetric
from pypar.ops.zero_gather import Gathering
from pypar.zero.partition import Layout


class Hosts:
    """The ranks of this rank's host, and those in its place on the others.

    A full tensor is one mapping of a host's ranks. Each of them gave the memory of its own shard, and of the shards
    that it brings: those of the ranks in its place on the other hosts. So a shard crosses the network once per host,
    and the ranks of a host share the wire.

    brought   ranks of the group whose parts of the mapping this rank gave and fills: its own first
    Source: two-level gathers as of ZeRO++ (Wang et al., 2023) and MiCS (Zhang et al., 2022).
    """

    def __init__(self, group: dist.ProcessGroup, hosts: list[list[int]]):
        rank, self.everyone = dist.get_rank(group), dist.get_process_group_ranks(group)
        hosts = [sorted(host, key=self.everyone.__getitem__) for host in hosts]  # as torch orders a new group
        members = next(host for host in hosts if rank in host)
        place = members.index(rank)
        self.rank, self.places = rank, {r: host.index(r) for host in hosts for r in host}
        self.across_ranks = sorted((host[place] for host in hosts), key=self.everyone.__getitem__)
        self.brought = [rank, *(r for r in self.across_ranks if r != rank)]
        self.local, self.across = self._subgroup(members), self._subgroup(self.across_ranks)
        self._released: dict[int, tuple[torch.Tensor, Layout]] = {}  # by address; nobody on this rank uses them

    def _subgroup(self, ranks: list[int]) -> dist.ProcessGroup:
        members = [self.everyone[r] for r in ranks]
        made = dist.new_group(members, backend="pypar", use_local_synchronization=True)
        assert isinstance(made, dist.ProcessGroup)
        return made

    @classmethod
    def of(cls, group: dist.ProcessGroup) -> Hosts | None:
        """Collective. None where there is nothing to share: one host, one rank on each, or hosts whose numbers of ranks
        differ, where every rank has a copy of its own."""
        hosts = symmetric.hosts_of(group)
        if hosts is None or len(hosts) == 1 or len(hosts[0]) == 1 or len({len(host) for host in hosts}) > 1:
            return None
        return cls(group, hosts)

    def memory(self, layout: Layout, dtype: torch.dtype) -> torch.Tensor:
        """[layout.numel], zero at first. Collective of the host."""
        owners = [self.places[r] for r in range(layout.world_size)]
        return symmetric.contiguous_parts(owners, layout.shard_sizes(), dtype, self.local)

    def gather(self, full: torch.Tensor, layout: Layout) -> Gathering:
        """Fills the parts of the other hosts. Collective."""
        self._released.pop(full.data_ptr(), None)
        parts = [full[slice(*layout.shard(r))] for r in self.across_ranks]
        own = full[slice(*layout.shard(self.rank))]
        return Gathering(dist.all_gather(parts, own, group=self.across, async_op=True), self.settle)

    def let_go(self, full: torch.Tensor, layout: Layout) -> None:
        """This rank no longer needs the parts of the other hosts: they are given back when no rank of the host does."""
        self._released[full.data_ptr()] = (full, layout)

    def settle(self) -> None:
        """Waits until all ranks of the host are here: what they gathered is whole, what they let go is given back.
        Collective of the host."""
        released, self._released = self._released, {}
        dist.barrier(group=self.local)
        for full, layout in released.values():
            for rank in self.brought[1:]:
                symmetric.give_back(full[slice(*layout.shard(rank))])
