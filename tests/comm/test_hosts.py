"""Groups whose ranks share no memory with all others: PYPAR_NODE_ID makes several "hosts" of this machine."""

from __future__ import annotations

import os
import time

import pytest
import torch
import torch.distributed as dist

from pypar import backend
from pypar.testing import run_ranks

pytestmark = pytest.mark.skipif(not backend.available(), reason="needs the compiled extension")


def start(rank: int, world: int, folder: str, nodes: str) -> list[list[int]]:
    os.environ["PYPAR_NODE_ID"] = nodes[rank]
    store = dist.FileStore(f"{folder}/store", world)
    dist.init_process_group("pypar", store=store, rank=rank, world_size=world)
    return dist.group.WORLD._get_backend(torch.device("cpu")).hosts


def values(rank: int, n: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 4, (n,), generator=torch.Generator().manual_seed(seed * 97 + rank)).to(dtype)


def equal(actual: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    assert actual.dtype == expected.dtype and torch.equal(actual, expected), f"{what}: {actual} != {expected}"


def check_reductions(rank: int, world: int) -> None:
    types = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int16, torch.int64, torch.uint8]
    for dtype in types:
        for n in (0, 1, 7, 20_011):  # below and above what one leader sends for its host
            everyone = torch.stack([values(r, n, dtype) for r in range(world)])
            for op, expected in (
                (dist.ReduceOp.SUM, everyone.sum(0, dtype=dtype)),
                (dist.ReduceOp.MAX, everyone.amax(0)),
            ):
                tensor = values(rank, n, dtype)
                dist.all_reduce(tensor, op)
                equal(tensor, expected, f"all_reduce {op} {dtype} {n}")
            tensor = values(rank, n, dtype)
            dist.reduce(tensor, world - 1)
            equal(tensor, everyone.sum(0, dtype=dtype) if rank == world - 1 else everyone[rank], f"reduce {dtype} {n}")
            shards = torch.stack([torch.cat([values(r, n, dtype, d) for d in range(world)]) for r in range(world)])
            out = torch.empty(n, dtype=dtype)
            dist.reduce_scatter_tensor(out, shards[rank].clone())
            expected = shards.sum(0, dtype=dtype).view(world, n)[rank]
            equal(out, expected, f"reduce_scatter_tensor {dtype} {n}")
            out = torch.empty(n, dtype=dtype)
            dist.reduce_scatter(out, list(shards[rank].view(world, n)))
            equal(out, expected, f"reduce_scatter {dtype} {n}")
    tensor = torch.full((40_000,), float(rank))
    dist.all_reduce(tensor, dist.ReduceOp.AVG)
    torch.testing.assert_close(tensor, torch.full((40_000,), sum(range(world)) / world))
    mask = torch.tensor([rank == 0, False])
    dist.all_reduce(mask)
    equal(mask, torch.tensor([True, False]), "bool")
    for dtype in (torch.float32, torch.float16):  # ReduceOp.PREMUL_SUM: the product in the type, then one rounded sum
        factor, n = 0.1 + rank, 30_011
        inputs = [values(r, n * world, dtype, 3) for r in range(world)]
        expected = sum((inputs[r] * (0.1 + r)).float() for r in range(world)).to(dtype)
        for given in (factor, torch.tensor([factor], dtype=torch.float64)):
            op = dist._make_nccl_premul_sum(given)
            tensor = inputs[rank].clone()
            dist.all_reduce(tensor, op)
            torch.testing.assert_close(tensor, expected)
            tensor = inputs[rank].clone()
            dist.reduce(tensor, 1, op)
            torch.testing.assert_close(tensor, expected if rank == 1 else inputs[rank])
            out = torch.empty(n, dtype=dtype)
            dist.reduce_scatter_tensor(out, inputs[rank], op)
            torch.testing.assert_close(out, expected.view(world, n)[rank])
    # A sum of half types is rounded once, also when it crosses hosts: 2048 + 1 + 1 + ... is lost one at a time.
    tensor = torch.full((20_000,), 2048.0 if rank == 0 else 1.0, dtype=torch.float16)
    dist.all_reduce(tensor)
    equal(tensor, torch.full((20_000,), 2048.0 + world - 1, dtype=torch.float32).to(torch.float16), "float16")


def check_moves(rank: int, world: int) -> None:
    for dtype in (torch.float32, torch.int64, torch.bool):
        for n in (1, 5, 9_001):
            everyone = [values(r, n, dtype) for r in range(world)]
            for root in range(world):
                tensor = everyone[rank].clone()
                dist.broadcast(tensor, root)
                equal(tensor, everyone[root], f"broadcast {dtype} {n} from {root}")
            out = torch.empty(world * n, dtype=dtype)
            dist.all_gather_into_tensor(out, everyone[rank])
            equal(out, torch.cat(everyone), f"all_gather_into_tensor {dtype} {n}")
            outs = [torch.empty(n, dtype=dtype) for _ in range(world)]
            dist.all_gather(outs, everyone[rank])
            equal(torch.stack(outs), torch.stack(everyone), f"all_gather {dtype} {n}")
            outs = [torch.empty(n, dtype=dtype) for _ in range(world)] if rank == 1 else None
            dist.gather(everyone[rank], outs, 1)
            if outs:
                equal(torch.stack(outs), torch.stack(everyone), f"gather {dtype} {n}")
            out = torch.empty(n, dtype=dtype)
            dist.scatter(out, everyone if rank == 1 else None, 1)
            equal(out, everyone[rank], f"scatter {dtype} {n}")
            if dtype != torch.bool:
                out = torch.empty(world * n, dtype=dtype)
                dist.all_to_all_single(out, torch.cat([values(rank, n, dtype, d) for d in range(world)]))
                equal(out, torch.cat([values(r, n, dtype, rank) for r in range(world)]), f"all_to_all {dtype} {n}")
    check_uneven_moves(rank, world)
    box = [None] * world
    dist.all_gather_object(box, f"rank {rank}")
    assert box == [f"rank {r}" for r in range(world)]


def check_uneven_moves(rank: int, world: int) -> None:
    for dtype in (torch.float32, torch.bool):
        for scale in (1, 3_001):
            sizes = [(r * 5 % 3) * scale for r in range(world)]  # some have nothing
            outs = [torch.empty(n, dtype=dtype) for n in sizes]
            dist.all_gather(outs, values(rank, sizes[rank], dtype))
            for r in range(world):
                equal(outs[r], values(r, sizes[r], dtype), f"all_gather of {sizes}")

            def n(src: int, dst: int) -> int:
                return ((src * 3 + dst * 2) % 4) * scale  # noqa: B023

            ins = [values(rank, n(rank, d), dtype, d) for d in range(world)]
            expected = [values(r, n(r, rank), dtype, rank) for r in range(world)]
            outs = [torch.empty(x.numel(), dtype=dtype) for x in expected]
            dist.all_to_all(outs, ins)
            for r in range(world):
                equal(outs[r], expected[r], f"all_to_all from {r}")
            out = torch.empty(sum(x.numel() for x in expected), dtype=dtype)
            dist.all_to_all_single(out, torch.cat(ins), [len(x) for x in expected], [len(x) for x in ins])
            equal(out, torch.cat(expected), "all_to_all_single")
    for dtype in (torch.float16, torch.int16):
        for op in (dist.ReduceOp.SUM, dist.ReduceOp.MIN):
            sizes = [(r + 1) * 1_001 for r in range(world)]
            shards = [[values(r, sizes[d], dtype, d) for d in range(world)] for r in range(world)]
            out = torch.empty(sizes[rank], dtype=dtype)
            dist.reduce_scatter(out, [x.clone() for x in shards[rank]], op)
            mine = torch.stack([row[rank] for row in shards])
            want = mine.sum(0, dtype=dtype) if op == dist.ReduceOp.SUM else mine.amin(0)
            equal(out, want, f"reduce_scatter of {sizes}, {op}")


def check_tags_and_any_source(rank: int, world: int) -> None:
    """Everybody sends to everybody, in two sizes and three tags; taken by tag, by source, and from anybody."""
    others = [r for r in range(world) if r != rank]
    works = []
    for size, shift in ((3, 0), (300_000, 10)):  # a rank may be at the second size while another is at the first
        for tag in (1, 2, 3):
            for dst in others:
                for i in range(3):
                    works.append(dist.isend(torch.full((size,), rank * 100 + tag * 10 + i), dst, tag=tag + shift))
        for src in others:  # of tag 2 first
            for i in range(3):
                out = torch.empty(size, dtype=torch.int64)
                assert dist.recv(out, src, tag=2 + shift) == src
                assert (out == src * 100 + 20 + i).all()
        early = [torch.empty(size, dtype=torch.int64) for _ in others]  # one from each, before the rest from anybody
        first = [dist.irecv(out, src, tag=1 + shift) for out, src in zip(early, others, strict=True)]
        for tag in (3, 1):
            counts = dict.fromkeys(others, int(tag == 1))
            for _ in range(3 * len(others) - sum(counts.values())):
                out = torch.empty(size, dtype=torch.int64)
                source = dist.recv(out, tag=tag + shift)
                assert (out == source * 100 + tag * 10 + counts[source]).all(), "messages overtook each other"
                counts[source] += 1
            assert set(counts.values()) == {3}
        for work, out, src in zip(first, early, others, strict=True):
            work.wait()
            assert (out == src * 100 + 10).all()
    for work in works:
        work.wait()
    # It comes without anybody waiting for it, and its future is told.
    out = torch.empty(5)
    works = [dist.irecv(out, (rank - 1) % world, tag=4), dist.isend(torch.arange(5.0), (rank + 1) % world, tag=4)]
    future = works[0].get_future().then(lambda f: f.value()[0].sum())
    works[1].wait()
    deadline = time.monotonic() + 20
    while not works[0].is_completed():
        assert time.monotonic() < deadline, "no progress in the background"
        time.sleep(0.001)
    assert out.sum().item() == 10 and future.wait().item() == 10


def check_messages(rank: int, world: int) -> None:
    out = torch.empty(1000)
    ops = [
        dist.P2POp(dist.isend, torch.full((1000,), float(rank)), (rank + 1) % world),
        dist.P2POp(dist.irecv, out, (rank - 1) % world),
    ]
    for work in dist.batch_isend_irecv(ops):
        work.wait()
    assert (out == (rank - 1) % world).all()
    check_tags_and_any_source(rank, world)


def check_async(rank: int, world: int) -> None:
    tensors = [torch.full((i * 5000 + 1,), float(rank)) for i in range(8)]
    works = [dist.all_reduce(tensor, async_op=True) for tensor in tensors]
    dist.barrier()
    for work in works:
        work.wait()
    assert all(work.is_completed() for work in works)
    for tensor in tensors:
        assert (tensor == sum(range(world))).all()


def all_checks(rank: int, world: int, folder: str, nodes: str) -> None:
    hosts = start(rank, world, folder, nodes)
    expected: dict[str, list[int]] = {}
    for r, node in enumerate(nodes):
        expected.setdefault(node, []).append(r)
    assert hosts == list(expected.values())
    check_reductions(rank, world)
    check_moves(rank, world)
    check_messages(rank, world)
    check_async(rank, world)
    mine = dist.new_group(hosts[[rank in host for host in hosts].index(True)], use_local_synchronization=True)
    assert not mine._get_backend(torch.device("cpu")).spans_hosts
    tensor = torch.ones(3)
    dist.all_reduce(tensor, group=mine)
    assert tensor[0].item() == mine.size()
    dist.barrier()


@pytest.mark.parametrize("nodes", ["aabb", "abab", "aab", "ab"])
def test_several_hosts(nodes, tmp_path):
    run_ranks(all_checks, len(nodes), str(tmp_path), nodes, backend="none")


def train(rank: int, world: int, folder: str, nodes: str) -> torch.Tensor:
    start(rank, world, folder, nodes)
    torch.manual_seed(0)
    model = torch.nn.parallel.DistributedDataParallel(
        torch.nn.Sequential(torch.nn.Linear(64, 300), torch.nn.Linear(300, 1))
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    data = torch.randn(world * 4, 64, generator=torch.Generator().manual_seed(1))
    for _ in range(3):
        model(data[rank * 4 : rank * 4 + 4]).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_data_parallel_over_hosts_is_data_parallel(tmp_path):
    (tmp_path / "two").mkdir()
    (tmp_path / "one").mkdir()
    two = run_ranks(train, 4, str(tmp_path / "two"), "aabb", backend="none")
    one = run_ranks(train, 4, str(tmp_path / "one"), "aaaa", backend="none")
    for weights in two:
        assert torch.equal(weights, two[0]), "ranks differ"
        torch.testing.assert_close(weights, one[0])
