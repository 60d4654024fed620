"""Symmetric memory: tensors that every rank of a group holds and every rank of that group can read and write."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from pypar import backend


def backend_name(group: dist.ProcessGroup, device: torch.device | str = "cpu") -> str:
    """The name of the backend that serves `device` in `group`, e.g. "pypar", "gloo", "nccl"; "" when none does."""
    config = dist.get_backend_config(group)  # "cpu:pypar,cuda:nccl"
    served = dict(entry.split(":", 1) for entry in config.split(",") if ":" in entry)
    return served.get(torch.device(device).type, "")


def hosts_of(group: dist.ProcessGroup, device: torch.device | str = "cpu") -> list[list[int]] | None:
    """The ranks of the group, host by host; None where pypar doesn't serve the group, which then can't tell."""
    if torch.device(device).type != "cpu" or not backend.available() or backend_name(group) != "pypar":
        return None
    served_by: Any = group._get_backend(torch.device("cpu"))
    return getattr(served_by, "wrapped_pg", served_by).hosts  # wrapped under TORCH_DISTRIBUTED_DEBUG=DETAIL


def shares_memory(group: dist.ProcessGroup, device: torch.device | str = "cpu") -> bool:
    """Whether all ranks of the group can map each other's memory: they are on one host, and pypar serves the group."""
    hosts = hosts_of(group, device)
    return hosts is not None and len(hosts) == 1


def contiguous(shard_sizes: list[int], dtype: torch.dtype, group: dist.ProcessGroup) -> torch.Tensor:
    """A flat tensor [sum(shard_sizes)] that exists once for all ranks: everybody gives the memory of its own shard, and
    maps all of them next to each other. Zero at first.

    A collective call of ranks that share memory (shares_memory); shards are whole pages of 4096 bytes, the same list on
    every rank. Who writes where, and when, is up to the ranks. Raises ValueError for sizes that aren't whole pages.
    """
    return contiguous_parts(list(range(len(shard_sizes))), shard_sizes, dtype, group)


def contiguous_parts(owners: list[int], sizes: list[int], dtype: torch.dtype, group: dist.ProcessGroup) -> torch.Tensor:
    """The same, [sum(sizes)], of parts: part i is memory that rank owners[i] gives."""
    extension = backend.extension
    assert extension is not None
    parts = extension.contiguous_parts(group.group_name, owners, [size * dtype.itemsize for size in sizes])
    return parts.view(dtype)


def give_back(part: torch.Tensor) -> None:
    """Gives the memory of whole pages of such a tensor back to the host, for every rank: they hold zeros until somebody
    writes there. Nobody may use them at the time."""
    extension = backend.extension
    assert extension is not None
    extension.give_back_pages(part)


def empty(numel: int, dtype: torch.dtype, group: dist.ProcessGroup, device: torch.device | str = "cpu") -> torch.Tensor:
    """A flat tensor [numel]: in symmetric memory when pypar serves the group's CPU tensors and
    all its ranks are on one host, else an ordinary one.

    In symmetric memory this is a collective call: every rank of the group makes it, in the same order, with the same
    numel and dtype. The tensor owns the handle of the rendezvous.
    """
    device = torch.device(device)
    if numel == 0 or not shares_memory(group, device):
        return torch.empty(numel, dtype=dtype, device=device)
    import torch.distributed._symmetric_memory as symm_mem

    tensor = symm_mem.empty(numel, dtype=dtype, device=device)
    tensor._pypar_rendezvous = symm_mem.rendezvous(tensor, group.group_name)  # type: ignore[attr-defined]
    return tensor
