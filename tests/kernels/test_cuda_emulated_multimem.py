"""all_reduce by the NVLink switch, emulated: the switch adds in an order that is not that of the ranks."""

from __future__ import annotations

import types

import cuda_executor
import pytest
import torch
import torch.distributed as dist

from pypar.channel import CHUNKS, EPOCH, HEADER_WORDS, channel_of
from pypar.ops.gpu import collectives, decide, reach
from pypar.reference.collectives import reduce_in_rank_order
from pypar.testing import run_ranks

pytestmark = pytest.mark.skipif(cuda_executor.COMPILER is None, reason="no g++ on this machine")
OPS = torch.ops.pypar_cuda
# Of one rounding to this type, relative; for float32 that of the sum is in is_close().
ERRORS = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
SLOT_BYTES = 1 << 15
TIMEOUT_S = 30.0


@pytest.fixture(scope="module", autouse=True)
def compiled():
    cuda_executor.load()


def parts_of(seed: int, numel: int, dtype: torch.dtype, world: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(numel, generator=generator, dtype=torch.float64).to(dtype) for _ in range(world)]


def is_close(got: torch.Tensor, parts: list[torch.Tensor], op: str) -> bool:
    """Any order of a float32 sum is allowed, and one rounding, or two for an average."""
    wide = torch.stack(parts).double()
    roundings, scale = (2, 1 / len(parts)) if op == "avg" else (1, 1)
    facts = torch.finfo(got.dtype)
    allowed = (roundings * ERRORS[got.dtype] * wide.sum(0).abs() + 1e-6 * wide.abs().sum(0)) * scale
    return bool(((got.double() - wide.sum(0) * scale).abs() <= allowed + facts.tiny * facts.eps).all())


def arguments_of(name: str, slot_bytes: int = SLOT_BYTES):
    made, arguments = cuda_executor.channel(dist.group.WORLD, name, slot_bytes)
    return made, (*arguments, TIMEOUT_S), {"multicast": cuda_executor.multicast(made)}


def sums(rank: int, world: int, laps: int) -> tuple[list[str], list[torch.Tensor], bool]:
    """What is wrong, all results, and whether any of them is not the sum in rank order."""
    cuda_executor.load()
    _, arguments, multicast = arguments_of("multimem")
    wrong, results, is_other, call = [], [], False, 0
    for _ in range(laps):
        for numel in (0, 1, world - 1, world, world + 1, 127, 129, 1024, 4099):
            for dtype in ERRORS:
                call += 1
                op = "avg" if call // 2 % 3 == 0 else "sum"
                parts = parts_of(call, numel, dtype, world)
                x = parts[rank]
                if call % 4 == 1:  # one element behind an aligned address
                    x = torch.cat([x[:1], x])[1:]
                out = x if call % 2 else torch.full_like(x, -77)
                OPS.all_reduce(x, out, op, "multimem", *arguments, **multicast)
                if not is_close(out, parts_of(call, numel, dtype, world), op):
                    wrong.append(f"call {call}: {op} of {numel} {dtype}")
                is_other |= not torch.equal(out, reduce_in_rank_order(parts_of(call, numel, dtype, world), op))
                results.append(out.clone())
    return wrong, results, is_other


def check(ranks: list[tuple[list[str], list[torch.Tensor], bool]]) -> None:
    for wrong, results, is_other in ranks:
        assert wrong == []
        assert all(torch.equal(a, b) for a, b in zip(results, ranks[0][1], strict=True)), "ranks hold other bits"
        # Or this test would not see a kernel that needs one order. Two numbers have but one sum, and one rounding here.
        assert is_other or len(ranks) == 2


@pytest.mark.parametrize("world", [2, 3, 4])
def test_the_same_bits_on_every_rank_and_close_to_float64(world):
    check(run_ranks(sums, world, 2))


@pytest.mark.parametrize("seed", [1, 2])
def test_stalls_change_nothing(monkeypatch, seed):
    expected = run_ranks(sums, 3, 1)
    monkeypatch.setenv("PYPAR_EMULATION_STALLS", f"{seed}:300")
    stalled = run_ranks(sums, 3, 1)
    check(stalled)
    assert all(torch.equal(a, b) for a, b in zip(stalled[0][1], expected[0][1], strict=True))


def over_the_end(rank: int, world: int) -> list[str]:
    """Calls -3, -2, ... 5: the numbers are compared modulo 2^32."""
    cuda_executor.load()
    channel, arguments, multicast = arguments_of("over the end")
    words = channel.memory.view(torch.int32)
    dist.barrier()
    words[EPOCH] = -4
    words[HEADER_WORDS : HEADER_WORDS + 2 * world * (CHUNKS + 1)] = -4  # as if all earlier calls had been made
    dist.barrier()
    wrong = []
    for call in range(9):
        parts = parts_of(call, 129, torch.float32, world)
        out = torch.empty(129)
        OPS.all_reduce(parts[rank], out, "sum", "multimem", *arguments, **multicast)
        if not is_close(out, parts, "sum"):
            wrong.append(f"call {call - 3}")
    dist.barrier()
    return wrong if words[EPOCH] == 5 else [*wrong, f"ends with call {words[EPOCH]}"]


def test_numbers_of_calls_go_round():
    assert run_ranks(over_the_end, 3) == [[]] * 3


def many_blocks(rank: int, world: int) -> bool:
    cuda_executor.load()
    _, arguments, multicast = arguments_of("many blocks", 1 << 20)
    parts = parts_of(1, 200_003, torch.float32, world)
    out = torch.zeros(200_003)
    OPS.all_reduce(parts[rank], out, "sum", "multimem", *arguments, **multicast)
    return is_close(out, parts, "sum")


def test_as_many_blocks_as_a_launch_has():
    assert run_ranks(many_blocks, 2) == [True, True]


def refusals(rank: int, world: int) -> list[str]:
    cuda_executor.load()
    _, (pointers, _, slot_bytes, _), multicast = arguments_of("refused", 4096)
    x, last = torch.ones(1 << 12), (pointers, rank, slot_bytes, 1.0)
    said = []
    for given, op, address in (
        (x[:8], "sum", {}),
        (x[:8], "sum", {"multicast": multicast["multicast"] + 4}),
        (x[:8], "max", multicast),
        (x[:8].double(), "sum", multicast),
        (x, "sum", multicast),
    ):
        try:
            OPS.all_reduce(given, given.clone(), op, "multimem", *last, **address)
        except ValueError as error:
            said.append(str(error).split("\n")[0])
    return said


def test_refuses_by_name_and_value():
    none, unaligned, op, dtype, slot = run_ranks(refusals, 2)[0]
    assert "multicast is 0, but algorithm multimem needs the multicast address" in none and "use two_shot" in none
    assert "needs the multicast address" in unaligned
    assert "op is 'max', expected sum or avg for algorithm multimem" in op
    assert "Double is not supported, expected float32, bfloat16 or float16" in dtype
    assert "needs 16384 bytes in each slot, the channel has 4096" in slot


def alone(rank: int, world: int) -> bool:
    cuda_executor.load()
    _, arguments, multicast = arguments_of("alone")
    x, out = torch.randn(129), torch.zeros(129)
    OPS.all_reduce(x, out, "avg", "multimem", *arguments, **multicast)
    return torch.equal(out, x)


def test_one_rank_has_its_own():
    assert run_ranks(alone, 1) == [True]


def calls_of(name: str) -> int:
    """That the channels of this name have seen; -1: there are none."""
    from pypar.channel import _channels

    kept = _channels.get((dist.group.WORLD.group_name, name, "cpu"))
    return sum(int(channel.words()[EPOCH]) for channel in kept) if kept else -1


def chosen(rank: int, world: int, asks: bool, has: bool, gives: bool) -> tuple[bool, int, int]:
    """asks: Limits; has: the group's memory has multicast addresses; gives: this channel's memory, too."""
    cuda_executor.load()
    group = dist.group.WORLD
    if asks:
        decide.set_limits(decide.Limits(multimem=True))
    if has:
        reach._multicast.add((group.group_name, "cpu"))
    if gives:
        channel = channel_of(group, "all_reduce multimem", 1 << 19, "cpu")
        channel.multicast = cuda_executor.multicast(channel)
    parts = parts_of(3, 70_001, torch.float32, world)
    right = is_close(collectives.all_reduce(parts[rank], "sum", group.group_name), parts, "sum")
    # Small ones, maxima and float64 go the other ways.
    small = collectives.all_reduce(parts[rank][:99], "sum", group.group_name)
    largest = collectives.all_reduce(parts[rank], "max", group.group_name)
    right = right and torch.equal(small, reduce_in_rank_order([p[:99] for p in parts], "sum"))
    right = right and torch.equal(largest, torch.stack(parts).amax(0))
    wide = collectives.all_reduce(parts[rank].double(), "sum", group.group_name)
    right = right and torch.equal(wide, reduce_in_rank_order([p.double() for p in parts], "sum"))
    return right, calls_of("all_reduce multimem"), calls_of("all_reduce two_shot")


@pytest.mark.parametrize(
    ("asks", "has", "gives", "multimem", "two_shot"),
    [
        (True, True, True, 1, 2),
        (False, True, True, 0, 3),
        (True, False, True, 0, 3),
        (True, True, False, 0, 3),
        (True, False, False, -1, 3),
    ],
)
def test_it_is_taken_by_those_who_ask_where_all_ranks_can(asks, has, gives, multimem, two_shot):
    assert run_ranks(chosen, 2, asks, has, gives) == [(True, multimem, two_shot)] * 2


def agreed(rank: int, world: int, lacking: int) -> tuple[int, bool, bool]:
    """The channel's address, and what the group knows of itself, where one rank's memory has no multicast address."""
    import torch.distributed._symmetric_memory as symm_mem

    group, rendezvous, has = dist.group.WORLD, symm_mem.rendezvous, rank != lacking

    def with_address(memory, group_name):
        handle = rendezvous(memory, group_name)
        return types.SimpleNamespace(buffer_ptrs=handle.buffer_ptrs, multicast_ptr=4096 * (rank + 1) * has, kept=handle)

    symm_mem.rendezvous = with_address
    address = channel_of(group, "agreed", 4096, "cpu").multicast
    reach._maps_peers = lambda group, device: ("", has)  # a GPU's memory isn't here
    gpu = torch.device("cuda", 0)
    return address, reach.reachable(group, gpu), reach.has_multicast(group, gpu)


def test_all_ranks_have_an_address_or_none_has():
    assert run_ranks(agreed, 3, -1) == [(4096, True, True), (8192, True, True), (12288, True, True)]
    assert run_ranks(agreed, 3, 1) == [(0, True, False)] * 3
