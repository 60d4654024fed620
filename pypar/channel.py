"""Channels: where a GPU kernel of one op meets the same kernel of the other ranks."""

from __future__ import annotations

import dataclasses
import struct
from typing import Any

import torch
import torch.distributed as dist

from pypar.errors import PeerError

CHUNKS = 256  # flags for each source and parity: the most pieces of a slot that are signalled one by one
HEADER_WORDS = 16  # of 4 bytes, the words below
ABORT_FOR = 256  # in the abort word: this plus the rank that was waited for in vain
EPOCH, DONE, ABORT, ERROR, ERROR_RANK, ERROR_INDEX, ERROR_EPOCH = range(7)
ERRORS = {1: "waited for the data of", 2: "waited for an empty slot of", 3: "stopped with the others, who waited for"}


def data_offset(world_size: int, chunks: int = CHUNKS) -> int:
    """Bytes before the slots: the header, full[2][world_size][chunks], empty[2][world_size]; a multiple of 256."""
    words = HEADER_WORDS + 2 * world_size * chunks + 2 * world_size
    return -(-4 * words // 256) * 256


@dataclasses.dataclass
class Channel:
    """Symmetric memory of one op of a group: a header, flags, and two slots of `slot_bytes`, one for each parity.

        word 0         epoch: the calls that are over; the kernel that ends a call writes it
        word 1         done: programs (blocks) of this call that are over; back to 0 with the epoch
        word 2         abort: a peer gave up
        words 3..6     error: code, rank, index, epoch; the first one stays
        full           [2][world_size][chunks] written by the source with the number of the call, polled here
        empty          [2][world_size] written by the consumer when it has read what this rank wrote for a call
        slots          [2][slot_bytes]

    `pointers` [world_size] int64 holds the address of every rank's channel, as this rank maps it. Call n uses parity
    n % 2 and may write when `empty` of that parity has reached n - 2. The kernels do all of that themselves, so that a
    captured graph replays.
    """

    name: str
    rank: int
    world_size: int
    slot_bytes: int
    timeout_s: float
    memory: torch.Tensor  # uint8, symmetric
    pointers: torch.Tensor  # int64 [world_size], on the device
    report: torch.Tensor  # int32 [4] of the host, pinned where there is a GPU: code, rank, index, call of an error
    ranks: list[int]  # of the world, for messages
    multicast: int = 0  # where one access reaches `memory` of all ranks (NVLink SHARP); 0 unless every rank has one

    def words(self) -> torch.Tensor:
        return self.memory[: 4 * HEADER_WORDS].view(torch.int32)

    def after(self) -> None:
        """Behind a kernel that writes no report itself: fetches its error, without waiting for a GPU."""
        if self.memory.device.type == "cpu":
            self.check()
        else:
            self.report.copy_(self.words()[ERROR : ERROR + 4], non_blocking=True)

    def raise_error(self) -> None:
        """Raises PeerError if an earlier kernel gave up, as far as that is known: a GPU is not waited for."""
        if self.report[0]:
            self._raise(*self.report.tolist())

    def check(self) -> None:
        """Raises PeerError if a kernel gave up. Waits for the device."""
        self.raise_error()
        epoch, _, abort, code, rank, index, at = self.words()[:7].tolist()
        if code:
            self._raise(code, rank, index, at)
        if abort:
            self._raise(3, abort - ABORT_FOR if abort >= ABORT_FOR else -1, 0, epoch + 1)

    def _raise(self, code: int, rank: int, index: int, call: int) -> None:
        peer = f"rank {self.ranks[rank]}" if 0 <= rank < self.world_size else "a rank that they name"
        span = "" if code == 3 else f", {self.timeout_s:g} s long"
        raise PeerError(
            f"{self.name}, call {call}: rank {self.ranks[self.rank]} {ERRORS.get(code, f'failed with code {code} at')} "
            f"{peer} (piece {index}){span}: did that rank make the same call, and is it alive?"
        )


def channel_of_one(name: str, device: torch.device) -> Channel:
    """For a kernel that is given a channel, on a rank that has nobody to exchange with: no group, and little memory."""
    memory = torch.zeros(data_offset(1) + 2 * 4096, dtype=torch.uint8, device=device)
    report = torch.zeros(4, dtype=torch.int32, pin_memory=device.type == "cuda")
    pointers = torch.tensor([memory.data_ptr()], dtype=torch.int64, device=device)
    return Channel(name, 0, 1, 4096, 600.0, memory, pointers, report, [0])


_channels: dict[tuple[str, str, str], list[Channel]] = {}


def timeout_of(group: dist.ProcessGroup, device: torch.device) -> float:
    """Seconds that the group's calls may take."""
    options = getattr(group._get_backend(device), "options", None)
    timeout = getattr(options, "_timeout", None)
    return timeout.total_seconds() if timeout is not None else 600.0


def channel_of(
    group: dist.ProcessGroup, name: str, slot_bytes: int, device: torch.device | str, timeout_s: float | None = None
) -> Channel:
    """The group's channel for the op (and algorithm) `name` with slots of at least `slot_bytes`.

    The first call for a size is collective: all ranks of the group make it, in the same order. A channel that has
    become too small stays allocated, since kernels that use it may still be queued.
    """
    import torch.distributed._symmetric_memory as symm_mem

    device = torch.device(device)
    kept = _channels.setdefault((group.group_name, name, str(device)), [])
    if kept and kept[-1].slot_bytes >= slot_bytes:
        kept[-1].raise_error()
        return kept[-1]
    slot_bytes = max(4096, 1 << (slot_bytes - 1).bit_length())
    total = data_offset(group.size()) + 2 * slot_bytes
    memory = symm_mem.empty(total, dtype=torch.uint8, device=device)
    memory.zero_()
    handle: Any = symm_mem.rendezvous(memory, group.group_name)
    multicasts: list[int] = [0] * group.size()
    dist.all_gather_object(multicasts, int(handle.multicast_ptr or 0), group=group)
    dist.barrier(group)  # nobody signals before every channel is zero
    signed = struct.unpack(f"{group.size()}q", struct.pack(f"{group.size()}Q", *handle.buffer_ptrs))
    memory._pypar_rendezvous = handle  # type: ignore[attr-defined]
    channel = Channel(
        name,
        group.rank(),
        group.size(),
        slot_bytes,
        timeout_of(group, device) if timeout_s is None else timeout_s,
        memory,
        torch.tensor(signed, dtype=torch.int64, device=device),
        torch.zeros(4, dtype=torch.int32, pin_memory=device.type == "cuda"),
        dist.get_process_group_ranks(group),
        multicasts[group.rank()] if all(multicasts) else 0,
    )
    kept.append(channel)
    return channel
