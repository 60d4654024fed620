"""ZeRO over ranks of several hosts, of which each holds one copy; PYPAR_NODE_ID makes several of this machine."""

import os
import re
import signal
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from zero.test_prefetch import WAYS, Watch
from zero.test_prefetch import train as train_stack
from zero.test_prefetch import train_alone as train_stack_alone
from zero.test_zero_parity import (
    CLOSE,
    OPTIMIZERS,
    Doubles,
    Model,
    assert_same,
    batch,
    loss_of,
    train_alone,
    train_sharded,
)

import pypar
from pypar import backend, symmetric
from pypar.testing import run_ranks, stalls

pytestmark = pytest.mark.skipif(not backend.available(), reason="needs the compiled extension")
ADAMW = OPTIMIZERS["AdamW"]


def start(rank, world, folder, nodes):
    os.environ["PYPAR_NODE_ID"] = nodes[rank]
    store = dist.FileStore(f"{folder}/store", world)
    dist.init_process_group("pypar", store=store, rank=rank, world_size=world)


def mapped_bytes(tensor):
    """Of the memory behind a tensor, what is there."""
    begin, end = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
    total = 0
    for entry in re.split(r"\n(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text()):
        low, high = (int(x, 16) for x in entry.split(" ")[0].split("-"))
        if begin <= low and high <= end:
            total += int(re.search(r"Rss: *(\d+) kB", entry)[1]) * 1024
    return total


def check_parts(rank, world):
    page = 4096
    owners, pages = [1, 0, 2, 0, 1], [3, 2, 1, 4, 0]
    full = symmetric.contiguous_parts(owners, [p * page // 4 for p in pages], torch.float32, dist.group.WORLD)
    parts = full.split([p * page // 4 for p in pages])
    assert not full.any()
    dist.barrier()
    for part, owner in zip(parts, owners, strict=True):
        if owner == rank:
            part.fill_(rank + 1)
    dist.barrier()
    assert torch.equal(full, torch.cat([torch.full_like(p, o + 1) for p, o in zip(parts, owners, strict=True)]))
    assert mapped_bytes(full) == 10 * page
    dist.barrier()
    if rank == 0:
        symmetric.give_back(parts[3])
    dist.barrier()
    assert mapped_bytes(full) == 6 * page, "the pages went for every rank"
    assert not parts[3].any() and (parts[1] == 1).all() and (parts[2] == 3).all()
    with pytest.raises(ValueError, match="not whole pages"):
        symmetric.give_back(full[1:])
    for owners, sizes, text in (([3], [0], "is of rank 3; the group has 3 ranks"), ([0], [5], "isn't whole pages")):
        with pytest.raises(ValueError, match=text):
            symmetric.contiguous_parts(owners, sizes, torch.float32, dist.group.WORLD)


def test_memory_of_several_ranks():
    run_ranks(check_parts, 3)


def check_parity(rank, world, folder, nodes):
    start(rank, world, folder, nodes)
    for stage in (1, 2, 3):
        for make in (Model, Doubles):
            with stalls(rank + 7):
                found = train_sharded(rank, world, stage, ADAMW, clip=0.3, model_class=make)
            assert_same(found, train_alone(world, ADAMW, clip=0.3, model_class=make))
        half = pypar.Zero(Model(), stage=stage, param_dtype=torch.bfloat16, lr=1e-3)
        for number in range(3):
            half.optimizer.zero_grad()
            loss_of(half, batch(world, number)[rank * 4 : rank * 4 + 4]).backward()
            half.optimizer.step()
        with half.full_params():
            for flat in half._flats:
                assert torch.equal(flat.own, flat.master.to(torch.bfloat16))
                full = flat.full.float()
                dist.all_reduce(full, op=dist.ReduceOp.AVG)
                assert torch.equal(full, flat.full.float()), "the same on every rank"


@pytest.mark.parametrize("nodes", ["aabb", "abba", "aab"])
def test_parity(nodes, tmp_path):
    run_ranks(check_parity, len(nodes), str(tmp_path), nodes, backend="none")


def check_prefetch(rank, world, folder, nodes):
    start(rank, world, folder, nodes)
    for way in WAYS:
        with stalls(rank + 3):
            _, weights, watch = train_stack(rank, world, way)
        torch.testing.assert_close(weights, train_stack_alone(world, way), **CLOSE, msg=lambda m, w=way: f"{w}: {m}")
        everyone = [None] * world
        dist.all_gather_object(everyone, watch.names)
        assert all(names == watch.names for names in everyone) and watch.peak == 2, way


def test_prefetch(tmp_path):
    run_ranks(check_prefetch, 4, str(tmp_path), "aabb", backend="none")


def check_one_copy(rank, world, folder, nodes):
    start(rank, world, folder, nodes)
    mates = [r for r in range(world) if nodes[r] == nodes[rank]]
    model = pypar.Zero(Model(width=256), stage=3)
    watch = Watch(model)
    flats = [f for f in model._flats if f.unit == "layers.2"]
    with torch.no_grad():
        loss_of(model, batch(world, 0))
    for flat in flats:
        own = sum(end - begin for begin, end in (flat.layout.shard(r) for r in mates)) * flat.dtype.itemsize
        assert mapped_bytes(flat.full) <= own, "only the shards of this host's ranks are left"
        assert mapped_bytes(flat.full) >= own - 4096 * len(mates)
    with model.full_params():
        weight = model.module.layers[2].down.weight
        same = weight.clone()
        dist.barrier()
        if rank == mates[0]:
            weight.data[0, 0] = 42.0 + mates[0]
        dist.barrier()
        assert weight[0, 0] == 42.0 + mates[0], "one copy for the ranks of the host"
        dist.barrier()
        weight.data.copy_(same)
        dist.barrier()
    assert watch.num_whole() == 0
    loss_of(model, batch(world, 0)).backward()
    assert watch.peak <= len(watch.units)


def test_one_copy_for_each_host(tmp_path):
    run_ranks(check_one_copy, 4, str(tmp_path), "abab", backend="none")


def killed(rank, world, folder, nodes):
    start(rank, world, folder, nodes)
    model = pypar.Zero(Model(), stage=3, lr=1e-3)
    for number in range(100):
        if rank == 3 and number == 2:  # while the next block is on its way
            model.module.layers[1].register_forward_hook(lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        with pytest.raises(pypar.PeerError) if number == 2 else torch.enable_grad():
            model.optimizer.zero_grad()
            loss_of(model, batch(world, number)[rank * 4 : rank * 4 + 4]).backward()
            model.optimizer.step()
        if number == 2:
            return


def test_a_killed_rank_ends_the_others(tmp_path):
    *_, failures = run_ranks(killed, 4, str(tmp_path), "aabb", backend="none", expect_failure=True)
    assert list(failures) == [3], failures
