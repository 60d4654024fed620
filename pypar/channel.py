"""Channels: where a GPU kernel of one op meets the same kernel of the other ranks."""

from __future__ import annotations

import dataclasses
import struct
from typing import Any

import torch
import torch.distributed as dist

CHUNKS = 256  # flags for each source and parity: the most pieces of a slot that are signalled one by one
HEADER_WORDS = 16  # of 4 bytes, the words below
EPOCH, DONE, ABORT, ERROR, ERROR_RANK, ERROR_INDEX, ERROR_EPOCH = range(7)
ERRORS = {1: "waited for the data of", 2: "waited for an empty slot of"}
ABORT_FOR = 256  # in the abort word, with the rank that was waited for in vain added; 1 says nothing more


class ChannelError(RuntimeError):
    """A wait of a kernel ended without what it waited for."""


def data_offset(world_size: int, chunks: int = CHUNKS) -> int:
    """Bytes before the slots: the header, full[2][world_size][chunks], empty[2][world_size], to a multiple of 256."""
    words = HEADER_WORDS + 2 * world_size * chunks + 2 * world_size
    return -(-4 * words // 256) * 256


@dataclasses.dataclass
class Channel:
    """Symmetric memory of one op of a group: a header, flags, and two slots of `slot_bytes`, one for each parity.

        word 0         epoch: the calls that are over; the kernel that ends a call writes it
        word 1         done: programs (blocks) of this call that are over; back to 0 with the epoch
        word 2         abort: a peer gave up; ABORT_FOR and the rank that it waited for, or 1
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
    memory: torch.Tensor  # uint8, symmetric
    pointers: torch.Tensor  # int64 [world_size], on the device
    ranks: list[int]  # of the world, for messages

    def words(self) -> torch.Tensor:
        return self.memory[: 4 * HEADER_WORDS].view(torch.int32)

    def check(self) -> None:
        """Raises ChannelError if a kernel gave up. On a GPU it waits for the device."""
        epoch, _, abort, code, rank, index, at = self.words()[:7].tolist()
        if code:
            raise ChannelError(
                f"{self.name}, call {at}: rank {self.ranks[self.rank]} {ERRORS.get(code, f'failed with {code} at')} "
                f"rank {self.ranks[rank]} (piece {index}) until its time was over: did that rank make the call?"
            )
        if abort:
            why = f"waiting for rank {self.ranks[abort - ABORT_FOR]}" if abort >= ABORT_FOR else "and says why"
            raise ChannelError(
                f"{self.name}, call {epoch + 1}: another rank gave up {why}; this one, "
                f"{self.ranks[self.rank]}, stopped with it"
            )


_channels: dict[tuple[str, str, str], list[Channel]] = {}


def channel_of(group: dist.ProcessGroup, name: str, slot_bytes: int, device: torch.device | str) -> Channel:
    """The group's channel for the op (and algorithm) `name` with slots of at least `slot_bytes`.

    The first call for a size is collective: all ranks of the group make it, in the same order. A channel that has
    become too small stays allocated, since kernels that use it may still be queued.
    """
    import torch.distributed._symmetric_memory as symm_mem

    device = torch.device(device)
    kept = _channels.setdefault((group.group_name, name, str(device)), [])
    if kept and kept[-1].slot_bytes >= slot_bytes:
        return kept[-1]
    slot_bytes = max(4096, 1 << (slot_bytes - 1).bit_length())
    total = data_offset(group.size()) + 2 * slot_bytes
    memory = symm_mem.empty(total, dtype=torch.uint8, device=device)
    memory.zero_()
    handle: Any = symm_mem.rendezvous(memory, group.group_name)
    dist.barrier(group)  # nobody signals before every channel is zero
    pointers = torch.tensor(
        struct.unpack(f"{group.size()}q", struct.pack(f"{group.size()}Q", *handle.buffer_ptrs)),
        dtype=torch.int64,
        device=device,
    )
    memory._pypar_rendezvous = handle  # type: ignore[attr-defined]
    channel = Channel(
        name, group.rank(), group.size(), slot_bytes, memory, pointers, dist.get_process_group_ranks(group)
    )
    kept.append(channel)
    return channel
