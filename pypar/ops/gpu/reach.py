"""Whether the kernels can reach the memory of all peers: agreed on by the group, once."""

from __future__ import annotations

import socket
import warnings

import torch
import torch.distributed as dist

from pypar import symmetric

_reachable: dict[tuple[str, str], bool] = {}


def _host() -> str:
    try:
        with open("/proc/sys/kernel/random/boot_id") as f:
            return f.read().strip()
    except OSError:
        return socket.gethostname()


def _maps_peers(group: dist.ProcessGroup, device: torch.device) -> str:
    """Rendezvous of a small symmetric tensor, "" when it works, else why it doesn't."""
    import torch.distributed._symmetric_memory as symm_mem

    try:
        memory = symm_mem.empty(1024, dtype=torch.uint8, device=device)
        handle = symm_mem.rendezvous(memory, group.group_name)
    except RuntimeError as error:
        return str(error).splitlines()[0]
    return (
        "" if len(handle.buffer_ptrs) == group.size() and all(handle.buffer_ptrs) else "a peer's memory has no address"
    )


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
            why = _maps_peers(group, device)
            whys: list[str | None] = [None] * group.size()
            dist.all_gather_object(whys, why, group=group)
            _reachable[key] = not any(whys)
            if why:
                warnings.warn(f"pypar: no peer-to-peer memory in this group ({why}); NCCL serves it", stacklevel=2)
    return _reachable[key]
