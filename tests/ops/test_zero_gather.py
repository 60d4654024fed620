"""zero_gather: every type, uneven and empty shards, in place, asynchronous, several hosts, wrong input."""

from __future__ import annotations

import os

import pytest
import torch
import torch.distributed as dist
from ops.collective_cases import FLOATS, same_bits, tensor_of

import pypar
from pypar import backend, symmetric
from pypar.reference.zero_gather import zero_gather as reference
from pypar.testing import run_ranks, stalls

TOTALS = [0, 1, 5, 17, 2047, 16_385, 700_003]  # the last is more than a slot of shared memory


def cuts(total, world):
    """Equal, uneven, and nothing for all but the last."""
    first = total - total // 3 if world > 1 else total
    yield [total] * world
    yield [first, *([total - first] + [0] * (world - 2) if world > 1 else [])]
    yield [0] * (world - 1) + [total]


def check_one(rank, world, dtype, sizes, seed):
    shards = [tensor_of(r, seed, (sizes[r],), dtype) for r in range(world)]
    wanted = torch.cat(shards)
    full = torch.full((sum(sizes),), 9.0, dtype=dtype)
    assert pypar.ops.zero_gather(full, shards[rank], sizes) is None
    assert same_bits(full, wanted)
    full = torch.full_like(wanted, 9.0)
    gathering = pypar.ops.zero_gather(full, shards[rank], sizes, async_op=True)
    other = torch.full_like(wanted, 9.0)
    second = pypar.ops.zero_gather(other, shards[rank], sizes, async_op=True)
    second.wait()  # not in the order of the calls
    gathering.wait()
    gathering.wait()
    assert same_bits(full, wanted) and same_bits(other, wanted)
    for asynchronous in (False, True):  # the shard where it belongs
        full = torch.full_like(wanted, 9.0)
        own = full[sum(sizes[:rank]) : sum(sizes[: rank + 1])].copy_(shards[rank])
        gathering = pypar.ops.zero_gather(full, own, sizes, async_op=asynchronous)
        if asynchronous:
            gathering.wait()
        assert same_bits(full, wanted)


def check(rank, world):
    for dtype in FLOATS:
        for total in TOTALS if dtype == torch.bfloat16 else TOTALS[:-1]:
            for seed, sizes in enumerate(cuts(total, world)):
                check_one(rank, world, dtype, sizes, seed)
    sizes = [3] * world
    full, same = torch.empty(3 * world), torch.empty(3 * world)
    shard = tensor_of(rank, 1, (6,), torch.float32)[::2]  # not contiguous
    pypar.ops.zero_gather(full, shard, sizes)
    reference(same, shard, sizes, dist.group.WORLD.group_name)
    assert torch.equal(full, same)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_zero_gather(world):
    run_ranks(check, world)


def test_over_gloo():
    run_ranks(check, 2, backend="gloo")


def check_symmetric(rank, world):
    sizes = [1000, 0, 70_001]
    memory = symmetric.empty(sum(sizes), torch.float32, dist.group.WORLD)
    with stalls(rank + 3):
        for seed in range(20):
            wanted = torch.cat([tensor_of(r, seed, (sizes[r],), torch.float32) for r in range(world)])
            pypar.ops.zero_gather(memory, tensor_of(rank, seed, (sizes[rank],), torch.float32), sizes)
            assert torch.equal(memory, wanted)
            memory.fill_(-1.0)  # it is this rank's again


@pytest.mark.skipif(not backend.available(), reason="needs the compiled extension")
def test_symmetric_memory():
    run_ranks(check_symmetric, 3)


def check_hosts(rank, world, folder, nodes):
    os.environ["PYPAR_NODE_ID"] = nodes[rank]
    store = dist.FileStore(f"{folder}/store", world)
    dist.init_process_group("pypar", store=store, rank=rank, world_size=world)
    for total in (1, 16_385):
        for seed, sizes in enumerate(cuts(total, world)):
            check_one(rank, world, torch.float16, sizes, seed)


@pytest.mark.skipif(not backend.available(), reason="needs the compiled extension")
@pytest.mark.parametrize("nodes", ["abab", "aab"])
def test_between_hosts(nodes, tmp_path):
    run_ranks(check_hosts, len(nodes), str(tmp_path), nodes, backend="none")


def check_wrong(rank, world):
    full, shard = torch.zeros(6), torch.zeros(3)
    for sizes, args, text in (
        ([3, 4], (full, shard), r"sizes \[3, 4\] don't cut full \[6\] for 2 ranks"),
        ([3, 3], (full.int(), shard), r"full is (Int|torch\.int32)"),
        ([3, 3], (torch.zeros(12)[::2], shard), "not contiguous"),
        ([3, 3], (full, torch.zeros(2)), rf"shard is .*\[2\], expected .*\[3\] on rank {rank}"),
        ([3, 3], (full, shard.double()), r"shard is (Double|torch\.float64)"),
    ):
        for asynchronous in (False, True):
            with pytest.raises(ValueError, match=text):
                pypar.ops.zero_gather(*args, sizes, async_op=asynchronous)
    with pytest.raises(pypar.PeerError, match="disagree"):
        pypar.ops.zero_gather(torch.zeros(6 - rank), torch.zeros(3 if rank == 0 else 2), [3, 3 - rank])


@pytest.mark.skipif(not backend.available(), reason="needs the compiled extension")
def test_wrong_input():
    run_ranks(check_wrong, 2)


def check_opcheck(rank, world):
    for sizes in ([4], [0]):
        torch.library.opcheck(
            torch.ops.pypar.zero_gather.default,
            (torch.zeros(sizes[0]), torch.rand(sizes[0]), sizes, dist.group.WORLD.group_name),
        )


def test_opcheck():
    run_ranks(check_opcheck, 1)
