"""The ring of csrc/cuda, executed on CPU: messages whose shapes change, credits that come back late."""

from __future__ import annotations

import struct

import cuda_executor
import pytest
import torch
import torch.distributed as dist
from test_cuda_emulated_collectives import payload

from pypar.testing import run_ranks

pytestmark = pytest.mark.skipif(cuda_executor.COMPILER is None, reason="no g++ on this machine")
OPS = torch.ops.pypar_cuda
SLOT_BYTES = 1 << 15
TIMEOUT_S = 30.0
TYPES = {6: torch.float32, 5: torch.float16, 15: torch.bfloat16, 7: torch.float64}  # at::ScalarType


@pytest.fixture(scope="module", autouse=True)
def compiled():
    cuda_executor.load()


def message(sender: int, piece: int) -> torch.Tensor:
    shape = [(), (0,), (1,), (7, 3), (129,), (2, 1, 5, 3, 1, 2, 2), (31, 33)][piece % 7]
    dtype = list(TYPES.values())[piece % 4]
    numel = torch.Size(shape).numel()
    return payload(1000 * sender + piece, numel, dtype, False).reshape(shape)


class End:
    """One rank's end: it counts, as the kernels' contract says, and reads the header."""

    def __init__(self, rank: int, peer: int, num_slots: int):
        self.channel, (self.pointers, self.rank, self.slot_bytes) = cuda_executor.channel(
            dist.group.WORLD, f"ring of {num_slots}", SLOT_BYTES
        )
        self.peer, self.num_slots = peer, num_slots
        self.sent = self.received = 0
        self.address = self.pointers.tolist()[peer]

    def send(self, x: torch.Tensor, timeout_s: float = TIMEOUT_S) -> None:
        self.sent += 1
        table = (self.pointers, self.rank, self.slot_bytes, timeout_s)
        OPS.ring_send(x, self.sent, self.num_slots, self.address, self.peer, *table)

    def recv(self) -> tuple[torch.Tensor, int]:
        self.received += 1
        header = torch.zeros(64, dtype=torch.uint8)
        table = (self.pointers, self.rank, self.slot_bytes, TIMEOUT_S)
        at = OPS.ring_recv(header, self.received, self.num_slots, self.peer, *table)
        kind, ndim, piece, *sizes = struct.unpack("BBxxI7q", bytes(header.tolist()))
        assert piece == self.received
        shape, dtype = torch.Size(sizes[:ndim]), TYPES[kind]
        data = self.channel.memory[at : at + shape.numel() * dtype.itemsize]
        return data.view(dtype).view(shape), piece

    def credit(self, piece: int) -> None:
        OPS.ring_credit(piece, self.num_slots, self.peer, self.pointers, self.rank, self.slot_bytes)


def both_ways(rank: int, world: int, num_slots: int, held: int) -> list[str]:
    """Every rank sends and receives 60 messages; up to `held` slots are given back late, the newest first."""
    cuda_executor.load()
    end, wrong, kept = End(rank, 1 - rank, num_slots), [], []
    for piece in range(1, 61):
        end.send(message(rank, piece))
        x, number = end.recv()
        kept.append((x, number))
        if len(kept) > held:
            for view, number in reversed(kept):
                expected = message(1 - rank, number)
                if not torch.equal(view, expected):
                    wrong.append(f"{number}: {expected.shape}")
                end.credit(number)
            kept.clear()
    return wrong


@pytest.mark.parametrize(("num_slots", "held"), [(1, 0), (2, 1), (5, 3)])
@pytest.mark.parametrize("stalls", ["", "5:400"])
def test_messages_arrive(num_slots, held, stalls, monkeypatch):
    monkeypatch.setenv("PYPAR_EMULATION_STALLS", stalls)
    assert run_ranks(both_ways, 2, num_slots, held) == [[], []]


def never_given_back(rank: int, world: int) -> str:
    cuda_executor.load()
    end = End(rank, 1 - rank, 2)
    said = ""
    if rank == 0:
        end.send(message(0, 1)), end.send(message(0, 2))
        try:
            end.send(message(0, 3), timeout_s=0.3)
        except RuntimeError as error:
            said = str(error).split("\n")[0]
        try:
            end.channel.check()
        except RuntimeError as error:
            said += f"; {error}"
    dist.barrier()
    return said


def test_a_slot_that_is_never_given_back():
    said = run_ranks(never_given_back, 2)[0]
    assert "the kernel ended in a trap" in said
    assert "call 3: rank 0 waited for an empty slot of rank 1" in said
