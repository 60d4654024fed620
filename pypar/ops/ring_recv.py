from __future__ import annotations

import torch
import torch.distributed as dist

from pypar.ops.library import define, name_of
from pypar.reference.ring_recv import ring_recv as reference


def _fake(*_: object) -> tuple[list[torch.Tensor], int]:
    raise RuntimeError("ring_recv: the sender alone knows the shapes, so that it can't be traced or compiled")


define(
    "ring_recv(Tensor(a!) mine, Tensor(b!) theirs, int num_slots, int peer, str group_name) -> (Tensor[], int)",
    reference,
    _fake,
)


def ring_recv(
    mine: torch.Tensor, theirs: torch.Tensor, num_slots: int, peer: int, group: dist.ProcessGroup | str | None = None
) -> tuple[list[torch.Tensor], int]:
    """(tensors, tag) of the next message of the ring from `peer` to this rank; see ring_send.

    Shapes         as sent. The tensors are views of the slot, which goes back to the sender when the last of them is
                   gone; those of a message that is larger than a slot are copies
    Communicates   a credit of 4 bytes
    Waits          for the message
    Concurrency    as ring_send
    Raises         ValueError: memory that is no ring, a peer that isn't in the group; pypar.PeerError: a peer that died
                   or left, no message within the group's timeout
    Source         as ring_send
    """
    return torch.ops.pypar.ring_recv(mine, theirs, num_slots, peer, name_of(group))
