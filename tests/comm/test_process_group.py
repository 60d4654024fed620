"""The collectives of the process group "pypar", against torch in one process and against gloo in the same ranks."""

from __future__ import annotations

import itertools
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from pypar import backend
from pypar.testing import run_ranks

pytestmark = pytest.mark.skipif(not backend.available(), reason="needs the compiled extension")

FLOATS = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
INTS = [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64]
SHAPES = [(), (0,), (1,), (7,), (3, 5), (1031,), (64, 1024), (700_001,)]


def values(rank: int, shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Small integers: sums are exact in every type. Any rank can make any other's."""
    generator = torch.Generator().manual_seed(1000 * seed + rank)
    return torch.randint(0, 5, shape, generator=generator).to(dtype)


def all_values(world: int, shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> list[torch.Tensor]:
    return [values(r, shape, dtype, seed) for r in range(world)]


def equal(actual: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    assert actual.dtype == expected.dtype and actual.shape == expected.shape, what
    assert torch.equal(actual, expected), f"{what}: {actual} != {expected}"


def check_all_reduce(rank: int, world: int) -> None:
    for dtype, shape in itertools.product(FLOATS + INTS, SHAPES):
        everyone = torch.stack(all_values(world, shape, dtype))
        for op, expected in (
            (dist.ReduceOp.SUM, everyone.sum(0, dtype=dtype)),
            (dist.ReduceOp.PRODUCT, everyone.prod(0, dtype=dtype)),
            (dist.ReduceOp.MIN, everyone.amin(0)),
            (dist.ReduceOp.MAX, everyone.amax(0)),
        ):
            tensor = values(rank, shape, dtype)
            dist.all_reduce(tensor, op)
            equal(tensor, expected, f"all_reduce {op} {dtype} {shape}")
    for dtype in INTS:
        everyone = torch.stack(all_values(world, (33,), dtype))
        tensor = values(rank, (33,), dtype)
        dist.all_reduce(tensor, dist.ReduceOp.BOR)
        expected = everyone[0].clone()
        for other in everyone[1:]:
            expected |= other
        equal(tensor, expected, f"all_reduce BOR {dtype}")
    tensor = values(rank, (50,), torch.float32)
    dist.all_reduce(tensor, dist.ReduceOp.AVG)
    torch.testing.assert_close(tensor, torch.stack(all_values(world, (50,), torch.float32)).mean(0))
    mask = torch.tensor([rank == 0, False, True])
    dist.all_reduce(mask)
    equal(mask, torch.tensor([True, False, True]), "all_reduce of bool")
    pairs = torch.complex(values(rank, (9,), torch.float32), values(rank, (9,), torch.float32, 1))
    expected = sum(all_values(world, (9,), torch.float32)) + 1j * sum(all_values(world, (9,), torch.float32, 1))
    dist.all_reduce(pairs)
    equal(pairs, expected, "all_reduce of complex")
    strided = values(rank, (6, 8), torch.float32).t()
    dist.all_reduce(strided)
    equal(
        strided, torch.stack(all_values(world, (6, 8), torch.float32)).sum(0).t(), "all_reduce of a transposed tensor"
    )
    several = [values(rank, (i,), torch.float32, i) for i in (3, 0, 7)]
    dist.all_reduce_coalesced(several)
    for i, tensor in zip((3, 0, 7), several, strict=True):
        equal(tensor, torch.stack(all_values(world, (i,), torch.float32, i)).sum(0), "all_reduce_coalesced")
    dense = torch.zeros(10, 2)
    dense[rank] = rank + 1.0
    dense[9] = 1.0
    sparse = dense.to_sparse(1)
    dist.all_reduce(sparse)
    expected = torch.zeros(10, 2)
    expected[:world] = torch.arange(1.0, world + 1)[:, None]
    expected[9] = world
    equal(sparse.to_dense(), expected, "all_reduce of sparse tensors")


def check_moves(rank: int, world: int) -> None:
    for dtype, shape in itertools.product([torch.float32, torch.bfloat16, torch.int64, torch.bool], SHAPES):
        everyone = all_values(world, shape, dtype)
        what = f"{dtype} {shape}"
        for root in range(world):
            tensor = values(rank, shape, dtype)
            dist.broadcast(tensor, root)
            equal(tensor, everyone[root], f"broadcast {what}")
            if dtype != torch.bool:
                tensor = values(rank, shape, dtype)
                dist.reduce(tensor, root)
                total = torch.stack(everyone).sum(0, dtype=dtype)
                equal(tensor, total if rank == root else everyone[rank], f"reduce {what}")
            outs = [torch.empty_like(everyone[0]) for _ in range(world)] if rank == root else None
            dist.gather(values(rank, shape, dtype), outs, root)
            for out, expected in zip(outs or [], everyone, strict=False):
                equal(out, expected, f"gather {what}")
            out = torch.empty_like(everyone[0])
            dist.scatter(
                out, [t + root if dtype != torch.bool else t for t in everyone] if rank == root else None, root
            )
            equal(out, everyone[rank] + root if dtype != torch.bool else everyone[rank], f"scatter {what}")
        outs = [torch.empty_like(everyone[0]) for _ in range(world)]
        dist.all_gather(outs, values(rank, shape, dtype))
        for out, expected in zip(outs, everyone, strict=True):
            equal(out, expected, f"all_gather {what}")
        if shape:
            out = torch.empty((world * shape[0], *shape[1:]), dtype=dtype)
            dist.all_gather_into_tensor(out, values(rank, shape, dtype))
            equal(out, torch.cat(everyone), f"all_gather_into_tensor {what}")


def check_scatters(rank: int, world: int) -> None:
    for dtype, n in itertools.product([*FLOATS, torch.int32], [0, 1, 5, 4096, 300_001]):
        shards = [[values(src, (n,), dtype, dst) for dst in range(world)] for src in range(world)]
        expected = torch.stack([shards[src][rank] for src in range(world)]).sum(0, dtype=dtype)
        out = torch.empty(n, dtype=dtype)
        dist.reduce_scatter(out, shards[rank])
        equal(out, expected, f"reduce_scatter {dtype} {n}")
        out = torch.empty(n, dtype=dtype)
        dist.reduce_scatter_tensor(out, torch.cat(shards[rank]))
        equal(out, expected, f"reduce_scatter_tensor {dtype} {n}")
    uneven = [values(rank, (dst + 2,), torch.float32, dst) for dst in range(world)]
    out = torch.empty(rank + 2)
    dist.reduce_scatter(out, uneven)
    expected = torch.stack([values(src, (rank + 2,), torch.float32, rank) for src in range(world)]).sum(0)
    equal(out, expected, "reduce_scatter of uneven shards")
    outs = [torch.empty(src + 1, 2) for src in range(world)]
    dist.all_gather(outs, torch.full((rank + 1, 2), float(rank)))
    for src, got in enumerate(outs):
        equal(got, torch.full((src + 1, 2), float(src)), "all_gather of uneven tensors")


def check_all_to_all(rank: int, world: int) -> None:
    for dtype, n in itertools.product([torch.float32, torch.float16, torch.int64], [0, 1, 9, 5000, 200_000]):
        source = [[values(src, (n, 2), dtype, dst) for dst in range(world)] for src in range(world)]
        out = torch.empty(world * n, 2, dtype=dtype)
        dist.all_to_all_single(out, torch.cat(source[rank]))
        equal(out, torch.cat([source[src][rank] for src in range(world)]), f"all_to_all_single {dtype} {n}")
        outs = [torch.empty(n, 2, dtype=dtype) for _ in range(world)]
        dist.all_to_all(outs, source[rank])
        for src in range(world):
            equal(outs[src], source[src][rank], f"all_to_all {dtype} {n}")
    send = [(rank + dst) % 3 for dst in range(world)]
    recv = [(src + rank) % 3 for src in range(world)]
    out = torch.empty(sum(recv), 3)
    dist.all_to_all_single(out, torch.full((sum(send), 3), float(rank)), recv, send)
    expected = torch.cat([torch.full((n, 3), float(src)) for src, n in enumerate(recv)])
    equal(out, expected, "all_to_all_single with splits")


def check_against_gloo(rank: int, world: int) -> None:
    """Random data: pypar's sums are in rank order, gloo's are not, so they agree within rounding."""
    gloo = dist.new_group(backend="gloo")
    generator = torch.Generator().manual_seed(rank)
    for n in (1, 1000, 100_000):
        mine = torch.randn(n * world, generator=generator)
        ours, theirs = mine.clone(), mine.clone()
        dist.all_reduce(ours)
        dist.all_reduce(theirs, group=gloo)
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
        ours, theirs = torch.empty(n), torch.empty(n)
        dist.reduce_scatter_tensor(ours, mine)
        dist.reduce_scatter_tensor(theirs, mine, group=gloo)
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    dist.destroy_process_group(gloo)


def check_async(rank: int, world: int) -> None:
    works, tensors = [], []
    for i in range(50):
        tensors.append(torch.full((1 + 777 * i,), float(rank + i)))
        works.append(dist.all_reduce(tensors[-1], async_op=True))
    last = torch.ones(3)
    dist.all_reduce(last)  # blocking, behind the queue
    for i, tensor in enumerate(tensors):  # before any wait(): the blocking call came last
        equal(tensor, torch.full_like(tensor, sum(range(world)) + world * i), f"async all_reduce {i}")
    for work in works:
        work.wait()
        assert work.is_completed() and work.is_success() and work.exception() is None
    work = dist.all_reduce(torch.full((4,), float(rank)), async_op=True)
    future = work.get_future().then(lambda f: f.value()[0] * 2)
    equal(future.wait(), torch.full((4,), 2.0 * sum(range(world))), "a future of all_reduce")
    outs = [torch.empty(2) for _ in range(world)]
    work = dist.all_gather(outs, torch.full((2,), float(rank)), async_op=True)
    work.wait()
    equal(torch.stack(work.result()), torch.stack(outs), "the result of all_gather")
    work = dist.barrier(async_op=True)
    work.wait()
    dropped = [dist.all_reduce(torch.ones(100_000), async_op=True) for _ in range(5)]
    del dropped
    # Issued in a callback of another call, which must not block the queue.
    chained = dist.all_reduce(torch.ones(2), async_op=True).get_future()
    second = chained.then(lambda f: dist.all_reduce(f.value()[0]) or f.value()[0])
    equal(second.wait(), torch.full((2,), float(world * world)), "an all_reduce in the callback of another")
    dist.barrier()


def check_objects(rank: int, world: int) -> None:
    out = [None] * world
    dist.all_gather_object(out, {"rank": rank, "text": "x" * rank})
    assert out == [{"rank": r, "text": "x" * r} for r in range(world)]
    box = [f"from {rank}", rank]
    dist.broadcast_object_list(box, src=world - 1)
    assert box == [f"from {world - 1}", world - 1]


def check_groups(rank: int, world: int) -> None:
    pairs = [dist.new_group([a, b]) for a, b in itertools.combinations(range(world), 2)]
    for group, (a, b) in zip(pairs, itertools.combinations(range(world), 2), strict=True):
        if rank not in (a, b):
            continue
        tensor = torch.tensor([float(rank)])
        dist.all_reduce(tensor, group=group)
        assert tensor.item() == a + b
        tensor = torch.tensor([float(rank)])
        dist.broadcast(tensor, b, group=group)
        assert tensor.item() == b
    mesh = dist.init_device_mesh("cpu", (world,), mesh_dim_names=("dp",))
    tensor = torch.ones(1)
    dist.all_reduce(tensor, group=mesh.get_group("dp"))
    assert tensor.item() == world
    parent = dist.group.WORLD
    half = parent.split_group(list(range(world - 1)), timeout=timedelta(seconds=30), group_name="half")
    if rank < world - 1:
        assert half.size() == world - 1
        tensor = torch.tensor([rank + 1.0])
        half.allreduce([tensor]).wait()
        assert tensor.item() == sum(range(1, world))
    else:
        assert half is None
    for group in pairs:
        if group is not dist.GroupMember.NON_GROUP_MEMBER:
            dist.destroy_process_group(group)


def check_flags(rank: int, world: int) -> None:
    group = dist.group.WORLD._get_backend(torch.device("cpu"))
    assert group.name() == "pypar" and dist.get_backend() == "pypar"
    assert group.supports_splitting and not group.supports_coalescing
    assert group.hosts == [list(range(world))] and not group.spans_hosts
    assert group.options._timeout == timedelta(seconds=60)
    before = group._get_sequence_number_for_group()
    dist.barrier()
    assert group._get_sequence_number_for_group() == before + 1
    group._set_default_timeout(timedelta(seconds=40))
    assert group.options._timeout == timedelta(seconds=40)


def check_refusals(rank: int, world: int) -> None:
    """A caller's mistakes raise before anything is sent: the group lives on."""
    for call, words in (
        (lambda: dist.all_reduce(torch.ones(2), dist.ReduceOp.BAND), "no meaning for float32"),
        (lambda: dist.all_reduce(torch.ones(2, dtype=torch.int32), dist.ReduceOp.AVG), "no meaning for int32"),
        (lambda: dist.all_reduce(torch.ones(2, dtype=torch.uint16)), "UInt16"),
        (lambda: dist.all_gather_into_tensor(torch.empty(5), torch.ones(4)), f"expected {4 * world}"),
        (lambda: dist.reduce_scatter_tensor(torch.empty(5), torch.ones(5 * world + 1)), f"expected {5 * world}"),
        (lambda: dist.all_to_all_single(torch.empty(2 * world - 1), torch.ones(2 * world - 1)), "divide equally"),
        (lambda: dist.all_to_all_single(torch.empty(2), torch.ones(2), [1] * world, [2] * world), "add up to dim 0"),
        (lambda: dist.group.WORLD.broadcast(torch.ones(1), world), "invalid root rank"),
        (lambda: dist.group.WORLD.allreduce([torch.ones(1), torch.ones(1)]), "single-element"),
    ):
        if world == 1 and words == "divide equally":
            continue
        with pytest.raises(ValueError, match=words):
            call()
    with pytest.raises(ValueError):
        dist.send(torch.ones(1), rank)
    tensor = torch.ones(1)
    dist.all_reduce(tensor)
    assert tensor.item() == world


def all_checks(rank: int, world: int) -> None:
    check_flags(rank, world)
    check_all_reduce(rank, world)
    check_moves(rank, world)
    check_scatters(rank, world)
    check_all_to_all(rank, world)
    check_async(rank, world)
    check_objects(rank, world)
    check_against_gloo(rank, world)
    check_refusals(rank, world)
    if world > 1:
        check_groups(rank, world)


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_collectives(world):
    run_ranks(all_checks, world)
