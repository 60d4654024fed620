from __future__ import annotations

import torch
import torch.distributed as dist

from pypar.reference.collectives import device_of, group_of
from pypar.reference.ring_send import DTYPES, FIRST, PER_TENSOR


def receive(peer: int, group: dist.ProcessGroup) -> tuple[list[torch.Tensor], int]:
    device = device_of(group)
    first = torch.zeros(2 + FIRST * PER_TENSOR, dtype=torch.int64, device=device)
    dist.recv(first, group=group, group_src=peer)
    number, tag, *flat = first.tolist()
    if number > FIRST:
        more = torch.zeros((number - FIRST) * PER_TENSOR, dtype=torch.int64, device=device)
        dist.recv(more, group=group, group_src=peer)
        flat += more.tolist()
    tensors = []
    for i in range(number):
        dtype, ndim, *sizes = flat[i * PER_TENSOR : (i + 1) * PER_TENSOR]
        tensors.append(torch.empty(sizes[:ndim], dtype=DTYPES[dtype], device=device))
        if tensors[-1].numel():
            dist.recv(tensors[-1], group=group, group_src=peer)
    return tensors, tag


def ring_recv(
    mine: torch.Tensor, theirs: torch.Tensor, num_slots: int, peer: int, group_name: str
) -> tuple[list[torch.Tensor], int]:
    return receive(peer, group_of(group_name))
