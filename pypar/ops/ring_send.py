from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

from pypar.ops.library import define, name_of
from pypar.reference.ring_send import ring_send as reference


def _slot_reference(sizes: Sequence[int], dtype: torch.dtype, *_: object) -> torch.Tensor:
    return torch.empty(sizes, dtype=dtype)


define(
    "ring_send(Tensor[] tensors, Tensor(a!) mine, Tensor(b!) theirs, int num_slots, int tag, int peer, str group_name) "
    "-> ()",
    reference,
    lambda *_: None,
)
define(
    "ring_slot(int[] sizes, ScalarType dtype, Tensor(a!) mine, Tensor(b!) theirs, int num_slots, int peer, "
    "str group_name) -> Tensor",
    _slot_reference,
    _slot_reference,
)


def ring_send(
    tensors: Sequence[torch.Tensor],
    mine: torch.Tensor,
    theirs: torch.Tensor,
    num_slots: int,
    peer: int,
    group: dist.ProcessGroup | str | None = None,
    *,
    tag: int = 0,
) -> None:
    """Writes tensors into the next slot of the ring from this rank to `peer`; pypar.symmetric.Ring makes the memory.

    Shapes         tensors of any shape up to 7 dims and any dtype, which may change from message to message; mine and
                   theirs uint8, this rank's and the peer's region of the ring, as symmetric.Ring lays them out
    tag            a number that travels along
    Communicates   64 bytes a tensor and its own, written once into the receiver's memory; nothing is copied of a first
                   tensor that was made where torch.ops.pypar.ring_slot says. More than a slot holds goes in pieces
    Waits          for a free slot: the receiver gives one back when it has let go of the message's tensors
    Concurrency    one sender and one receiver per ring, each in one thread at a time
    Raises         ValueError: memory that is no ring, a peer that isn't in the group; pypar.PeerError: a peer that
                   died, no free slot within the group's timeout
    Source         Lamport, Proving the Correctness of Multiprocess Programs (1977): the single-writer ring
    """
    torch.ops.pypar.ring_send(tensors, mine, theirs, num_slots, tag, peer, name_of(group))
