"""all_reduce, reduce_scatter and all_gather of csrc/cuda, executed on CPU by ranks in processes of their own."""

from __future__ import annotations

import re

import cuda_executor
import pytest
import torch
import torch.distributed as dist

from pypar.channel import ABORT, ABORT_FOR, CHUNKS, DONE, EPOCH, ERROR, HEADER_WORDS
from pypar.reference.collectives import reduce_in_rank_order
from pypar.testing import run_ranks

pytestmark = pytest.mark.skipif(cuda_executor.COMPILER is None, reason="no g++ on this machine")
OPS = torch.ops.pypar_cuda
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SLOT_BYTES = 1 << 19
TIMEOUT_S = 30.0


@pytest.fixture(scope="module", autouse=True)
def compiled():
    cuda_executor.load()


def payload(seed: int, numel: int, dtype: torch.dtype, integers: bool) -> torch.Tensor:
    """Another one for every seed. Integers whose sums and products are exact; or any numbers."""
    generator = torch.Generator().manual_seed(seed)
    if integers:
        return torch.randint(-2, 3, (numel,), generator=generator).to(dtype)
    return torch.randn(numel, generator=generator, dtype=torch.float64).to(dtype)


def shifted(x: torch.Tensor) -> torch.Tensor:
    """The same numbers one element behind an aligned address."""
    room = x.new_empty(x.numel() + 1)
    room[1:] = x
    return room[1:]


def numels(world: int) -> list[int]:
    return [0, 1, world - 1, world, world + 1, 127, 129, 1024, 4099]


def collectives(rank: int, world: int, ops: list[str], laps: int) -> tuple[list[str], list[torch.Tensor]]:
    """What differs from the reference, and all results."""
    cuda_executor.load()
    arguments = {
        name: (*cuda_executor.channel(dist.group.WORLD, name, SLOT_BYTES)[1], TIMEOUT_S)
        for name in ("one_shot", "two_shot", "scatter", "gather", "copied")
    }
    addresses = arguments["copied"][0].tolist()
    wrong: list[str] = []
    results: list[torch.Tensor] = []

    def check(what: str, got: torch.Tensor, expected: torch.Tensor) -> None:
        if not torch.equal(got, expected):
            wrong.append(what)
        results.append(got)

    call = 0
    for _ in range(laps):
        for numel in numels(world):
            for dtype in DTYPES:
                call += 1
                op = ops[call % len(ops)]
                parts = [payload(100 * call + r, numel, dtype, call % 3 == 0) for r in range(world)]
                x, expected = parts[rank], reduce_in_rank_order(parts, op)
                what = f"call {call}: {op} of {numel} {dtype}"
                if call % 4 == 1:
                    x = shifted(x)
                for algorithm in ("one_shot", "two_shot"):
                    out = x.clone() if call % 2 else torch.full_like(x, -77)
                    OPS.all_reduce(out if call % 2 else x, out, op, algorithm, *arguments[algorithm])
                    check(f"{algorithm}, {what}", out, expected)
                sizes = [len(cut) for cut in torch.arange(numel).tensor_split(world)]
                if call % 2:  # ranks that hold none, and one that holds twice as much
                    sizes = [0, *sizes[:-2], sizes[-2] + sizes[-1]]
                begin = sum(sizes[:rank])
                shard = expected[begin : begin + sizes[rank]]
                out = torch.full_like(shard, -77)
                OPS.reduce_scatter(x, out, sizes, op, *arguments["scatter"])
                check(f"scatter, {what}", out, shard)
                mine = shifted(shard) if call % 3 else shard.clone()
                for name in ("gather", "copied"):
                    full = torch.full_like(expected, -77)
                    if name == "gather":
                        OPS.all_gather(mine, full, sizes, *arguments[name])
                    else:
                        OPS.all_gather_copied(mine, full, sizes, addresses, *arguments[name])
                    check(f"{name}, {what}", full, expected)
    return wrong, results


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_bits_of_the_reference_in_every_call(world):
    """Another payload and shape in each of some seventy calls per channel; also out of place, in place, unaligned."""
    if world == 1:
        assert run_ranks(all_reduce_alone, 1) == [True]
        return
    for wrong, _ in run_ranks(collectives, world, ["sum", "avg", "max", "min", "product"], 2):
        assert wrong == []


def all_reduce_alone(rank: int, world: int) -> bool:
    cuda_executor.load()
    x, out = torch.randn(129), torch.zeros(129)
    for algorithm in ("one_shot", "two_shot"):
        _, arguments = cuda_executor.channel(dist.group.WORLD, algorithm, SLOT_BYTES)
        OPS.all_reduce(x, out.zero_(), "avg", algorithm, *arguments, TIMEOUT_S)
        if not torch.equal(out, x):
            return False
    return True


@pytest.mark.parametrize("seed", [1, 2])
def test_stalls_change_nothing(monkeypatch, seed):
    monkeypatch.setenv("PYPAR_EMULATION_STALLS", f"{seed}:300")
    for wrong, _ in run_ranks(collectives, 3, ["sum"], 1):
        assert wrong == []


def many_blocks(rank: int, world: int) -> bool:
    """Every block has several rounds to do, and there are as many as a launch has at most."""
    cuda_executor.load()
    equal = True
    for algorithm in ("one_shot", "two_shot"):
        _, arguments = cuda_executor.channel(dist.group.WORLD, algorithm, 1 << 23)
        parts = [payload(r, 200_003, torch.float32, False) for r in range(world)]
        out = torch.zeros(200_003)
        OPS.all_reduce(parts[rank], out, "sum", algorithm, *arguments, TIMEOUT_S)
        equal = equal and torch.equal(out, reduce_in_rank_order(parts, "sum"))
    return equal


def test_as_many_blocks_as_a_launch_has():
    assert run_ranks(many_blocks, 2) == [True, True]


def over_the_end(rank: int, world: int) -> list[str]:
    """Calls -3, -2, ... 5: the numbers are compared modulo 2^32."""
    cuda_executor.load()
    wrong = []
    for algorithm in ("one_shot", "two_shot"):
        channel, arguments = cuda_executor.channel(dist.group.WORLD, algorithm, SLOT_BYTES)
        words = channel.memory.view(torch.int32)
        flags = slice(HEADER_WORDS, HEADER_WORDS + 2 * world * (CHUNKS + 1))
        dist.barrier()
        words[EPOCH] = -4
        words[flags] = -4  # as if all earlier calls had been made
        dist.barrier()
        for call in range(9):
            parts = [payload(100 * call + r, 129, torch.float32, False) for r in range(world)]
            out = torch.empty(129)
            OPS.all_reduce(parts[rank], out, "sum", algorithm, *arguments, TIMEOUT_S)
            if not torch.equal(out, reduce_in_rank_order(parts, "sum")):
                wrong.append(f"{algorithm}, call {call - 3}")
        dist.barrier()
        if words[EPOCH] != 5:
            wrong.append(f"{algorithm} ends with call {words[EPOCH]}")
    return wrong


def test_numbers_of_calls_go_round():
    assert run_ranks(over_the_end, 3) == [[]] * 3


def test_the_layout_of_channels_is_one():
    text = (cuda_executor.ROOT / "csrc" / "cuda" / "channel.cuh").read_text()
    constants = {m[1]: int(m[2]) for m in re.finditer(r"constexpr \w+ (k\w+) = (\d+);", text)}
    assert constants["kHeaderWords"] == HEADER_WORDS and constants["kChunks"] == CHUNKS
    assert constants["kAbortFor"] == ABORT_FOR
    names = re.search(r"enum Word : int \{ (.*?) \};", text)
    assert names is not None
    order = [name.strip() for name in names[1].split(",")]
    assert [order.index(name) for name in ("kEpoch", "kDone", "kAbort", "kError")] == [EPOCH, DONE, ABORT, ERROR]


def zeros_and_nans(rank: int, world: int) -> tuple[torch.Tensor, torch.Tensor]:
    cuda_executor.load()
    _, arguments = cuda_executor.channel(dist.group.WORLD, "nans", SLOT_BYTES)
    x = torch.tensor([0.0, -0.0, float("nan"), 1.0]) if rank == 0 else torch.tensor([-0.0, 0.0, 2.0, float("nan")])
    low, high = torch.empty(4), torch.empty(4)
    OPS.all_reduce(x, low, "min", "two_shot", *arguments, TIMEOUT_S)
    OPS.all_reduce(x, high, "max", "two_shot", *arguments, TIMEOUT_S)
    return low, high


def test_of_equal_numbers_the_earlier_one_and_a_nan_stays():
    for low, high in run_ranks(zeros_and_nans, 2):
        for y in (low, high):
            assert y[:2].signbit().tolist() == [False, True]
            assert y[2:].isnan().all()


def refusals(rank: int, world: int) -> list[str]:
    cuda_executor.load()
    _, (pointers, _, slot_bytes) = cuda_executor.channel(dist.group.WORLD, "refused", 4096)
    x = torch.ones(1 << 16)
    said = []
    for arguments in (
        (x, x, "sum", "two_shot", pointers, rank, slot_bytes, 1.0),
        (x, x, "mean", "two_shot", pointers, rank, slot_bytes, 1.0),
        (x.long(), x.long(), "sum", "two_shot", pointers, rank, slot_bytes, 1.0),
        (x, x[1:], "sum", "two_shot", pointers, rank, slot_bytes, 1.0),
        (x, x, "sum", "tree", pointers, rank, slot_bytes, 1.0),
        (x, x, "sum", "two_shot", pointers, world, slot_bytes, 1.0),
    ):
        try:
            OPS.all_reduce(*arguments)
        except ValueError as error:
            said.append(str(error).split("\n")[0])
    return said


def test_refuses_by_name_and_value():
    slot, op, dtype, out, algorithm, rank = run_ranks(refusals, 2)[0]
    assert "needs 524288 bytes in each slot, the channel has 4096" in slot
    assert "op is 'mean'" in op and "Long is not supported" in dtype
    assert "out is Float[65535]" in out and "algorithm is 'tree'" in algorithm and "rank 2 of 2" in rank
