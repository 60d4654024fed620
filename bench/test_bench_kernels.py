"""Kernel-level benches, one process: what a call costs, and what the arithmetic costs, without a peer to wait for.

pytest --benchmark-only bench/     (each is verified before it is timed)
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist

from pypar import backend

pytest.importorskip("pytest_benchmark")
SIZES = {"8B": 8, "16KiB": 16 << 10, "1MiB": 1 << 20, "16MiB": 16 << 20}
sizes = pytest.mark.parametrize("nbytes", SIZES.values(), ids=SIZES.keys())


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def alone() -> Iterator[str]:
    """The name of a group of one on pypar."""
    if not backend.available():
        pytest.skip("the compiled extension is not there")
    dist.init_process_group(
        "pypar" if "pypar" in dist.Backend.backend_list else "gloo", store=dist.HashStore(), rank=0, world_size=1
    )
    group = dist.group.WORLD
    assert group is not None
    yield group.group_name
    dist.destroy_process_group()


@sizes
def test_sum_of_two_in_torch(benchmark, nbytes: int) -> None:
    """The yardstick: a sum that torch computes, as many bytes as an all_reduce of two ranks adds."""
    a, b = torch.ones(nbytes // 4), torch.full((nbytes // 4,), 2.0)
    out = torch.add(a, b)
    assert out.eq(3).all()
    benchmark(torch.add, a, b, out=out)


@sizes
@pytest.mark.parametrize("op", ["all_reduce_", "reduce_scatter_out", "all_gather_out", "broadcast_"])
def test_op_alone(benchmark, alone: str, op: str, nbytes: int) -> None:
    """Dispatch, checks and at most one copy: a world of one."""
    x, out = torch.arange(nbytes // 4).float(), torch.zeros(nbytes // 4)
    args = {
        "all_reduce_": (x, "sum", alone),
        "reduce_scatter_out": (out, x, "sum", alone),
        "all_gather_out": (out, x, alone),
        "broadcast_": (x, 0, alone),
    }[op]
    call = getattr(torch.ops.pypar, op)
    call(*args)
    assert (out if op.endswith("_out") else x).equal(torch.arange(nbytes // 4).float())
    benchmark(call, *args)
