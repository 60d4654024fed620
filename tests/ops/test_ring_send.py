"""ring_send: shapes, pieces, messages made in their slot; containers."""

import pytest
import torch
import torch.distributed as dist

import pypar
from pypar.pipeline_parallel.ring import Channel, Edge, make_rings
from pypar.testing import run_ranks, stalls

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.bool, torch.uint8]
SHAPES = [(), (0,), (1,), (3, 5), (16,), (17,), (2, 3, 1, 2, 1, 3, 2), (1000,)]


def tensor_of(seed, shape, dtype):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * 8).to(dtype)


def ring_of(num_slots=3, slot_bytes=4096, src=0, dst=1):
    return make_rings([Edge(src, dst, num_slots, slot_bytes)], dist.group.WORLD).get(0)


def every_shape(rank, world, slot_bytes):
    ring = ring_of(slot_bytes=slot_bytes)
    seed = 0
    for dtype in DTYPES:
        for shape in SHAPES:
            wants = [tensor_of(seed + k, shape, dtype) for k in range(1 + seed % 3)]
            if rank == 0:
                ring.send(wants, seed)
            elif rank == 1:
                tensors, tag = ring.recv()
                assert tag == seed and len(tensors) == len(wants)
                for got, want in zip(tensors, wants, strict=True):
                    assert got.dtype == dtype and got.shape == want.shape and torch.equal(got, want), (dtype, shape)
                del tensors, got  # else their slot is taken while the next message comes in pieces
            seed += 1
    if rank == 0:
        ring.send([], -7)
        ring.send([tensor_of(1, (8, 6), torch.float32).t()], 1)
        ring.finish()
    elif rank == 1:
        assert ring.recv() == ([], -7)
        assert torch.equal(ring.recv()[0][0], tensor_of(1, (8, 6), torch.float32).t())


@pytest.mark.parametrize("slot_bytes", [128, 1024, 1 << 16])
@pytest.mark.parametrize("backend", ["pypar", "gloo"])
def test_every_shape_and_type_in_one_slot_or_in_pieces(backend, slot_bytes):
    run_ranks(every_shape, 3 if slot_bytes == 1024 else 2, slot_bytes, backend=backend)


def many(rank, world, calls):
    forth, back = make_rings([Edge(0, 1, 4, 1024), Edge(1, 0, 5, 640)], dist.group.WORLD).values()
    with stalls(7 + rank, most_us=20):
        held = []
        for call in range(calls):
            x = torch.full((call % 300,), float(call))
            if rank == 0:
                forth.send([x, x + 1], call)
                (y,), tag = back.recv()
                assert tag == call and torch.equal(y, 2 * x)
            else:
                (y, z), tag = forth.recv()
                assert tag == call and torch.equal(y, x) and torch.equal(z, x + 1)
                held.append(y)  # a slot is given back one message late, out of order with its own successor
                held = held[-1:]
                back.send([2 * y], call)


def test_ten_thousand_messages_under_stalls():
    run_ranks(many, 2, 10_000)


LARGE = [65535, 65536, 65537, 131_071, 300_001]  # bytes; from 64 KiB on they go past the caches


def large(rank, world):
    ring = ring_of(num_slots=2, slot_bytes=1 << 19)
    with stalls(3 + rank, most_us=50):
        for call in range(60):
            wants = [tensor_of(call + k, (n + 1,), torch.uint8)[(call + k) % 2 :] for k, n in enumerate(LARGE[:4])]
            wants.append(tensor_of(call, (LARGE[call % 5] // 4,), torch.float32))
            if rank == 0:
                ring.send(wants[call % 5 :], call)
            else:
                tensors, tag = ring.recv()
                assert tag == call and all(torch.equal(a, b) for a, b in zip(tensors, wants[call % 5 :], strict=True))
                del tensors
    if rank == 0:
        ring.finish()


def test_large_tensors_of_odd_sizes_from_odd_addresses():
    run_ranks(large, 2)


def in_place(rank, world):
    ring = ring_of(num_slots=2, slot_bytes=1 << 12)
    for call in range(5):
        if rank == 0:
            x = ring.empty((10, 3), torch.float32)
            x.copy_(tensor_of(call, (10, 3), torch.float32))
            ring.send([x, torch.ones(2)], call)
        else:
            tensors, _ = ring.recv()
            assert torch.equal(tensors[0], tensor_of(call, (10, 3), torch.float32)) and torch.equal(
                tensors[1], torch.ones(2)
            )
    if rank == 0:
        assert ring.empty((1 << 20,), torch.float32).shape == (1 << 20,)  # larger than a slot: an ordinary tensor


def test_a_message_made_in_its_slot():
    run_ranks(in_place, 2)


def payloads(rank, world):
    channel = Channel(ring_of(num_slots=4))  # as many as are held at a time
    x = torch.randn(3, requires_grad=True)
    messages = [
        {"h": torch.ones(2), "more": (None, 3, "mask")},
        {"h": torch.zeros(2), "more": (None, 3, "mask")},
        (x, [torch.arange(3)]),
        torch.ones(()),
    ]
    if rank == 0:
        for tag, message in enumerate(messages):
            channel.send(message, tag)
        channel.ring.finish()
    else:
        first = channel.recv(0)
        assert torch.equal(first["h"], torch.ones(2)) and first["more"] == (None, 3, "mask")
        x, (y,) = channel.recv(2)  # before 1, which came first
        assert x.requires_grad and x.is_leaf and not y.requires_grad
        assert torch.equal(channel.recv(1)["h"], torch.zeros(2))
        assert channel.recv(3) == 1


@pytest.mark.parametrize("backend", ["pypar", "gloo"])
def test_containers_whose_structure_changes(backend):
    run_ranks(payloads, 2, backend=backend)


def bad(rank, world):
    ring = ring_of()
    memory, name = ring.mine, dist.group.WORLD.group_name
    with pytest.raises(ValueError, match="num_slots is 0"):
        torch.ops.pypar.ring_send([], memory, memory, 0, 0, 1 - rank, name)
    with pytest.raises(ValueError, match="the ring is"):
        torch.ops.pypar.ring_recv(memory[1:], memory, 3, 1 - rank, name)
    with pytest.raises(ValueError, match="peer 5 is not another rank"):
        torch.ops.pypar.ring_recv(memory, memory, 3, 5, name)
    with pytest.raises(ValueError, match="more than 7 dims"):
        ring.send([torch.ones([1] * 8)], 0)
    for edge in (Edge(0, 0, 1, 128), Edge(0, 5, 1, 128), Edge(0, 1, 0, 128), Edge(0, 1, 65, 128), Edge(0, 1, 1, 1)):
        with pytest.raises(ValueError, match="ring from rank 0"):
            make_rings([edge], dist.group.WORLD)


def test_wrong_input():
    run_ranks(bad, 2)
    assert pypar.ops.ring_send.__doc__ and pypar.ops.ring_recv.__doc__
