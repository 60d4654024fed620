"""A ring between two GPUs, whose data goes by copy engine (csrc/cuda/ring_*.cu), behind the interface of pipelines."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

from pypar.channel import channel_of
from pypar.ops.gpu.run import cuda_kernels
from pypar.reference.ring_send import DTYPES, FIRST, PER_TENSOR, heads_of

PIECE_HEADER_BYTES = 64


class PeerRing:
    """One end of an edge from rank src to rank dst of the group; both directions of its channel belong to it.

    A message is its head (how many tensors, their types and sizes) and then each tensor, in as many pieces as slots
    need. The receiver learns sizes on the host, for which it waits for its stream, as it does with NCCL. Making one is
    collective over the group: all ranks, the same edges in the same order. slot_bytes: of a message's piece.
    """

    def __init__(
        self, src: int, dst: int, num_slots: int, slot_bytes: int, group: dist.ProcessGroup, device: torch.device
    ):
        each = -(-(slot_bytes + PIECE_HEADER_BYTES) // 256) * 256
        channel = channel_of(group, f"ring from {src} to {dst}", -(-num_slots * each // 2), device)
        self._channel, self._device, self._num_slots = channel, device, num_slots
        self._peer = dst if channel.rank == src else src
        self._addresses = channel.pointers.tolist()
        self._most = 2 * channel.slot_bytes // num_slots // 256 * 256 - PIECE_HEADER_BYTES
        self._sent = self._received = 0
        pinned = device.type == "cuda"
        self._header = torch.zeros(2 * PIECE_HEADER_BYTES, dtype=torch.uint8, pin_memory=pinned)
        start = -self._header.data_ptr() % 64
        self._header = self._header[start : start + PIECE_HEADER_BYTES]

    def _where(self) -> tuple[torch.Tensor, int, int]:
        return self._channel.pointers, self._channel.rank, self._channel.slot_bytes

    def _send_flat(self, flat: torch.Tensor) -> None:
        for piece in flat.split(max(1, self._most // flat.element_size())):
            self._sent += 1
            address = self._addresses[self._peer]
            limits = (self._channel.timeout_s, self._channel.report)
            cuda_kernels("ring_send")(piece, self._sent, self._num_slots, address, self._peer, *self._where(), *limits)

    def _recv_flat(self, flat: torch.Tensor) -> None:
        for piece in flat.split(max(1, self._most // flat.element_size())):
            self._received += 1
            limits = (self._channel.timeout_s, self._channel.report)
            at = cuda_kernels("ring_recv")(
                self._header, self._received, self._num_slots, self._peer, *self._where(), *limits
            )
            piece.copy_(self._channel.memory[at : at + piece.nbytes].view(piece.dtype))
            cuda_kernels("ring_credit")(self._received, self._num_slots, self._peer, *self._where())

    def send(self, tensors: Sequence[torch.Tensor], tag: int = 0) -> None:
        self._channel.raise_error()
        try:
            for head in heads_of(tensors, tag):
                self._send_flat(head.to(self._device))
            for x in tensors:
                if x.numel():
                    self._send_flat(x.detach().to(self._device).contiguous().view(-1))
        except RuntimeError:
            self._channel.raise_error()
            raise

    def recv(self) -> tuple[list[torch.Tensor], int]:
        self._channel.raise_error()
        try:
            return self._recv()
        except RuntimeError:
            self._channel.raise_error()
            raise

    def _recv(self) -> tuple[list[torch.Tensor], int]:
        number, tag, *flat = self._numbers(2 + FIRST * PER_TENSOR)
        if number > FIRST:
            flat += self._numbers((number - FIRST) * PER_TENSOR)
        tensors = []
        for i in range(number):
            dtype, ndim, *sizes = flat[i * PER_TENSOR : (i + 1) * PER_TENSOR]
            tensors.append(torch.empty(sizes[:ndim], dtype=DTYPES[dtype], device=self._device))
            if tensors[-1].numel():
                self._recv_flat(tensors[-1].view(-1))
        return tensors, tag

    def _numbers(self, count: int) -> list[int]:
        numbers = torch.zeros(count, dtype=torch.int64, device=self._device)
        self._recv_flat(numbers)
        return numbers.tolist()

    def empty(self, sizes: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(sizes, dtype=dtype, device=self._device)

    def finish(self) -> None:
        """Nothing: what was sent lies at the receiver, or is queued on this rank's stream."""
