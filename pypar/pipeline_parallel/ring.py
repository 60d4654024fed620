"""Rings from stage to stage: shared slots where the ranks share memory, messages of the process group elsewhere."""

from __future__ import annotations

import pickle
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch.utils import _pytree as pytree

from pypar import backend, symmetric
from pypar.ops.gpu.reach import reachable
from pypar.ops.gpu.ring import PeerRing
from pypar.ops.gpu.run import cuda_kernels
from pypar.reference.collectives import device_of
from pypar.reference.ring_recv import receive
from pypar.reference.ring_send import start_send

HEAD_BYTES = 64 * (4 + 4)  # RingHead of csrc/cpu/ring.h: four lines, and 64 credits of 4 bytes
SLOT_HEAD_BYTES = 64
MAX_SLOTS = 64


@dataclass(frozen=True)
class Edge:
    """From rank src to rank dst of the group, with num_slots messages of up to slot_bytes under way; larger ones go in
    pieces."""

    src: int
    dst: int
    num_slots: int
    slot_bytes: int

    @property
    def region_bytes(self) -> int:
        return HEAD_BYTES + self.num_slots * (SLOT_HEAD_BYTES + -(-self.slot_bytes // 64) * 64)


class Ring(Protocol):
    """What an edge gives each of its two ranks."""

    def send(self, tensors: Sequence[torch.Tensor], tag: int) -> None:
        """Waits while all slots are taken. The tensors may change afterwards."""

    def recv(self) -> tuple[list[torch.Tensor], int]:
        """(tensors, tag) of the next message."""

    def empty(self, sizes: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Where the first tensor of the next message is to be made, so that send need not copy it."""

    def finish(self) -> None:
        """Returns when what was sent no longer needs this rank."""


class SharedRing:
    """mine, theirs: this rank's and the peer's region, uint8."""

    def __init__(self, edge: Edge, mine: torch.Tensor, theirs: torch.Tensor, group: dist.ProcessGroup, owner: Any):
        self.edge, self.mine, self.theirs, self.group, self._owner = edge, mine, theirs, group, owner
        self.name = group.group_name
        self.peer = edge.dst if dist.get_rank(group) == edge.src else edge.src
        extension = backend.extension
        assert extension is not None
        self._end = extension.RingEnd(mine, theirs, edge.num_slots, self.peer, self.name)

    def send(self, tensors: Sequence[torch.Tensor], tag: int = 0) -> None:
        self._end.send(tensors, tag)

    def recv(self) -> tuple[list[torch.Tensor], int]:
        return self._end.recv()

    def empty(self, sizes: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        where = (self.mine, self.theirs, self.edge.num_slots, self.peer, self.name)
        return torch.ops.pypar.ring_slot(sizes, dtype, *where)

    def finish(self) -> None:
        pass


class RemoteRing:
    """The same over the process group, whose sends run in the background, num_slots of them at a time."""

    def __init__(self, edge: Edge, group: dist.ProcessGroup):
        self.edge, self.group = edge, group
        self.peer = edge.dst if dist.get_rank(group) == edge.src else edge.src
        self._under_way: deque[list[tuple[Any, Any]]] = deque()

    def send(self, tensors: Sequence[torch.Tensor], tag: int = 0) -> None:
        while len(self._under_way) >= self.edge.num_slots:
            self._wait(self._under_way.popleft())
        own = [x.detach().to(device_of(self.group), copy=True) for x in tensors]  # they may change while they travel
        self._under_way.append(start_send(own, tag, self.peer, self.group))

    def _wait(self, parts: list[tuple[Any, Any]]) -> None:
        for work, _ in parts:
            work.wait()

    def recv(self) -> tuple[list[torch.Tensor], int]:
        return receive(self.peer, self.group)

    def empty(self, sizes: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(sizes, dtype=dtype, device=device_of(self.group))

    def finish(self) -> None:
        while self._under_way:
            self._wait(self._under_way.popleft())


def make_rings(edges: Sequence[Edge], group: dist.ProcessGroup) -> dict[int, Ring]:
    """{index of an edge: this rank's end of it}, of those edges that begin or end here. Collective over the group:
    every rank gives the same edges. Raises ValueError for an edge that can't be."""
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    for edge in edges:
        if edge.src == edge.dst or not (0 <= edge.src < world and 0 <= edge.dst < world):
            raise ValueError(f"ring from rank {edge.src} to {edge.dst}: not two ranks of the group of {world}")
        if not 1 <= edge.num_slots <= MAX_SLOTS or edge.slot_bytes < 128:
            raise ValueError(
                f"ring from rank {edge.src} to {edge.dst}: {edge.num_slots} slots of {edge.slot_bytes} bytes; there "
                f"are 1 to {MAX_SLOTS}, of 128 bytes or more"
            )
    here = {i: e for i, e in enumerate(edges) if rank in (e.src, e.dst)}
    device = device_of(group)
    if edges and device.type == "cuda" and cuda_kernels("ring_send") is not None and reachable(group, device):
        made = [PeerRing(e.src, e.dst, e.num_slots, e.slot_bytes, group, device) for e in edges]  # collective
        return {i: made[i] for i in here}
    if not edges or not symmetric.shares_memory(group):
        return {i: RemoteRing(e, group) for i, e in here.items()}
    ends = [0] * world  # of what each rank's edges take so far
    places: list[dict[int, int]] = []
    for edge in edges:
        places.append({r: ends[r] for r in (edge.src, edge.dst)})
        for r in (edge.src, edge.dst):
            ends[r] += edge.region_bytes
    memory = symmetric.empty(max(ends), torch.uint8, group)
    memory[: ends[rank]].zero_()
    handle: Any = memory._pypar_rendezvous  # type: ignore[attr-defined]
    dist.barrier(group=group)  # nobody writes into memory that is not zero yet
    rings: dict[int, Ring] = {}
    for i, edge in here.items():
        peer = edge.dst if rank == edge.src else edge.src
        mine = memory[places[i][rank] : places[i][rank] + edge.region_bytes]
        theirs = handle.get_buffer(peer, [edge.region_bytes], torch.uint8, places[i][peer])
        rings[i] = SharedRing(edge, mine, theirs, group, memory)
    return rings


class Channel:
    """A ring for nested containers of tensors: their structure travels when it changes, the tensors each time."""

    def __init__(self, ring: Ring):
        self.ring = ring
        self._sent: Any = None
        self._received: Any = None
        self._early: dict[int, Any] = {}  # messages that came before they were asked for, by tag
        self.most_bytes = 0  # of a message that was sent
        self.sent_bytes = 0  # of all tensors so far, without the structure

    def send(self, payload: Any, tag: int) -> None:
        """A container of tensors and of what pickle takes. Which of the tensors require a gradient travels along."""
        leaves, spec = pytree.tree_flatten(payload)
        kinds = [leaf.requires_grad if isinstance(leaf, torch.Tensor) else (leaf,) for leaf in leaves]
        tensors = [leaf.detach() for leaf in leaves if isinstance(leaf, torch.Tensor)]
        self.sent_bytes += sum(x.nbytes for x in tensors)
        structure = (kinds, spec)
        is_new = structure != self._sent
        if is_new:
            self._sent = structure
            text = pickle.dumps((kinds, pytree.treespec_dumps(spec)))
            tensors.append(torch.frombuffer(bytearray(text), dtype=torch.uint8))
        self.most_bytes = max(self.most_bytes, sum(64 + -(-x.nbytes // 64) * 64 for x in tensors))
        self.ring.send(tensors, 2 * tag + is_new)

    def recv(self, tag: int) -> Any:
        """The message with that tag; its tensors are leaves. Those with other tags that come first are kept."""
        while tag not in self._early:
            tensors, number = self.ring.recv()
            if number % 2:
                kinds, spec = pickle.loads(tensors.pop().cpu().numpy().tobytes())
                self._received = (kinds, pytree.treespec_loads(spec))
            kinds, spec = self._received
            rest = iter(tensors)
            leaves = [next(rest).requires_grad_(kind) if isinstance(kind, bool) else kind[0] for kind in kinds]
            self._early[number // 2] = pytree.tree_unflatten(leaves, spec)
        return self._early.pop(tag)
