"""Copies into peers' slots by the copy engine, which takes no multiprocessor from the matmul; plain copies on CPU.

Compiled and executed under emulation; not yet run on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

HEADER_WORDS = 16  # the layout of pypar/channel.py, which a test compares


def memory_at(address: int, num_bytes: int, device: torch.device) -> torch.Tensor:
    """uint8 [num_bytes]: a peer's memory as this rank maps it. It must outlive the tensor."""
    storage = torch._C._construct_storage_from_data_pointer(address, device, num_bytes)
    return torch.empty(0, dtype=torch.uint8, device=device).set_(storage)


def slot_offset(call: int, slot_bytes: int, world_size: int, chunks: int) -> int:
    """Bytes from the start of a channel to the slot of this call."""
    words = HEADER_WORDS + 2 * world_size * chunks + 2 * world_size
    return -(-4 * words // 256) * 256 + (call & 1) * slot_bytes


def push_by_copies(
    x: torch.Tensor,
    opened: torch.Tensor,
    addresses: Sequence[int],
    rank: int,
    slot_bytes: int,
    stride_shard: int,
    call: int | None,
    chunks: int,
) -> None:
    """x to place `rank` of every peer's slot, rank - 1 first.

    No flag: what a copy engine writes has no strength in PTX's memory model, so a kernel behind the copies publishes.
    opened: as open_call writes it; on a GPU the host goes by `call`, which has to be the same.
    """
    world_size = len(addresses)
    if x.device.type == "cpu":
        number, free = opened.tolist()
        if not free:  # what the slots hold is still being read; the wait that failed has told every peer
            return
        call = number
    if call is None:
        raise ValueError("all_gather_matmul: copies on a GPU need the number of the call, which says where they go")
    num_bytes = x.numel() * x.element_size()
    if not num_bytes:
        return
    for step in range(1, world_size):
        peer = addresses[(rank - step) % world_size]
        shard = peer + slot_offset(call, slot_bytes, world_size, chunks) + rank * stride_shard * x.element_size()
        memory_at(shard, num_bytes, x.device).copy_(x.view(-1).view(torch.uint8), non_blocking=True)


def beside(push: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """Starts `push` beside what the caller does next; the function returned makes what follows it come after.

    On a GPU on another stream; on CPU at once, since Triton's interpreter runs one kernel at a time.
    """
    if device.type != "cuda":
        push()
        return lambda: None
    current, stream = torch.cuda.current_stream(device), torch.cuda.Stream(device)
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        push()
    return lambda: current.wait_stream(stream)
