"""Every instruction set for which the reduce kernels are built gives the bits of the plain-torch reference."""

from __future__ import annotations

import hashlib
import platform
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ops.collective_cases import FLOATS, INTEGERS

from pypar import backend
from pypar.reference.collectives import reduce_in_rank_order
from pypar.testing import run_ranks

# Around the vectors of every width and the block of 1024 elements, with tails.
COUNTS = [0, 1, 7, 31, 33, 1023, 1025, 5000]
NEEDS = {
    "plain": set(),
    "avx2": {"avx2", "f16c"},
    "avx512": {"avx2", "f16c", "avx512f", "avx512bw", "avx512vl", "avx512dq"},
}


def processor_flags() -> set[str]:
    text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    line = next((line for line in text.splitlines() if line.startswith("flags")), "")
    return set(line.partition(":")[2].split())


def bits_of(x: torch.Tensor) -> torch.Tensor:
    whole = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return x.view(whole[x.element_size()])


def edges(dtype: torch.dtype) -> torch.Tensor:
    """Numbers whose pairs are infinite, subnormal, zero of either sign, or halfway between two numbers of `dtype`."""
    info = torch.finfo(dtype)
    eps, tiny, least = info.eps, info.tiny, info.smallest_normal * info.eps
    numbers = [0.0, 1.0, 1.0 + eps, eps / 2, 3 * eps / 2, tiny, least, 3 * least, 0.5, 1.5, 2**-12, info.max]
    numbers += [info.max * eps / 4, float("inf")]  # max + half of its last place: infinity or max, by the rounding
    numbers += [-x for x in numbers]
    return torch.tensor([*numbers, float("nan")], dtype=torch.float64).to(dtype)


def part_of(source: int, count: int, dtype: torch.dtype) -> torch.Tensor:
    """What `source` holds: edge against edge, then ordinary numbers, then any bit pattern."""
    generator = torch.Generator().manual_seed(count * 10 + source)
    size = torch.empty(0, dtype=dtype).element_size()
    if dtype == torch.bool:
        return torch.rand(count, generator=generator) < 0.5
    any_bits = (
        torch.randint(0, 256, (count * size,), generator=generator, dtype=torch.int64).to(torch.uint8).view(dtype)
    )
    if not dtype.is_floating_point:
        return any_bits
    special = edges(dtype)[torch.randint(0, len(edges(dtype)), (count,), generator=generator)]
    ordinary = torch.randn(count, generator=generator, dtype=torch.float64).to(dtype)
    kind = torch.randint(0, 3, (count,), generator=torch.Generator().manual_seed(count))
    return torch.where(kind == 0, special, torch.where(kind == 1, ordinary, any_bits))


def reductions(dtype: torch.dtype) -> list[str]:
    common = ["sum", "product", "min", "max"]
    return [*common, "avg"] if dtype.is_floating_point else [*common, "band", "bor", "bxor"]


def check(rank: int, world: int, capability: str) -> list[str]:
    assert backend.extension is not None and backend.extension.cpu_capability() == capability
    seen = []
    groups = {size: dist.new_group(list(range(size))) for size in (2, 3, 4)}
    for size, group in groups.items():
        digest = hashlib.sha256()
        for dtype in [*FLOATS, *INTEGERS, torch.bool] if rank < size else []:
            for count in COUNTS:
                parts = [part_of(source, count, dtype) for source in range(size)]
                for op in reductions(dtype):
                    got = torch.ops.pypar.all_reduce(parts[rank], op, group.group_name)
                    want = reduce_in_rank_order(parts, op)
                    digest.update(bits_of(got).numpy().tobytes())
                    # Which bits a NaN has is left to the processor, by torch too; that it is one is not.
                    same = (bits_of(got) == bits_of(want)) | ((got != got) & (want != want))
                    wrong = (~same).nonzero().flatten().tolist()[:3]
                    assert not wrong, [
                        (op, dtype, count, i, [p[i].item() for p in parts], got[i].item(), want[i].item())
                        for i in wrong
                    ]
        seen.append(digest.hexdigest())
    return seen


@pytest.mark.skipif(platform.machine() != "x86_64", reason="other instruction sets are built for x86-64 only")
@pytest.mark.parametrize("capability", ["plain", "avx2", "avx512"])
def test_bits_are_those_of_the_reference(capability, monkeypatch):
    missing = NEEDS[capability] - processor_flags()
    if missing:
        pytest.skip(f"this processor lacks {', '.join(sorted(missing))}")
    monkeypatch.setenv("PYPAR_CPU_CAPABILITY", capability)
    results = run_ranks(check, 4, capability)
    for place, size in enumerate((2, 3, 4)):  # NaNs included: all ranks of a group hold the same bits
        assert len({result[place] for result in results[:size]}) == 1
