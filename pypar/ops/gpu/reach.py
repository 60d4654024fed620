"""Whether the kernels can reach the memory of all peers, and of all at once: agreed on by the group, once."""

from __future__ import annotations

import socket
import warnings

import torch
import torch.distributed as dist

from pypar import symmetric

_reachable: dict[tuple[str, str], bool] = {}
_multicast: set[tuple[str, str]] = set()  # groups whose memory has multicast addresses on every rank


def _host() -> str:
    try:
        with open("/proc/sys/kernel/random/boot_id") as f:
            return f.read().strip()
    except OSError:
        return socket.gethostname()


def _maps_peers(group: dist.ProcessGroup, device: torch.device) -> tuple[str, bool]:
    """Rendezvous of a small symmetric tensor: "" when it works, else why not; whether it has a multicast address."""
    import torch.distributed._symmetric_memory as symm_mem

    try:
        memory = symm_mem.empty(1024, dtype=torch.uint8, device=device)
        handle = symm_mem.rendezvous(memory, group.group_name)
    except RuntimeError as error:
        return str(error).splitlines()[0], False
    if len(handle.buffer_ptrs) != group.size() or not all(handle.buffer_ptrs):
        return "a peer's memory has no address", False
    return "", bool(handle.multicast_ptr)


def reachable(group: dist.ProcessGroup, device: torch.device) -> bool:
    """Whether every rank of the group can map every other's memory on such a device.

    The first call of a group is collective: all ranks tell their host, and, where it is one, try to map each other's
    memory; a rank that can't makes all of them use the process group instead, and says why.
    """
    if device.type == "cpu":  # the emulation
        return symmetric.shares_memory(group)
    key = (group.group_name, device.type)
    if key not in _reachable:
        hosts: list[str | None] = [None] * group.size()
        dist.all_gather_object(hosts, _host(), group=group)
        if len(set(hosts)) > 1:
            _reachable[key] = False
        else:
            why, has_multicast = _maps_peers(group, device)
            found: list[tuple[str, bool]] = [("", False)] * group.size()
            dist.all_gather_object(found, (why, has_multicast), group=group)
            _reachable[key] = not any(why for why, _ in found)
            if all(has for _, has in found):
                _multicast.add(key)
            if why:
                warnings.warn(f"pypar: no peer-to-peer memory in this group ({why}); NCCL serves it", stacklevel=2)
    return _reachable[key]


def has_multicast(group: dist.ProcessGroup, device: torch.device) -> bool:
    """Whether symmetric memory of the group has a multicast address (NVLink SHARP), as reachable() has found."""
    return (group.group_name, device.type) in _multicast
