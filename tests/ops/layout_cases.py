"""What the tests of determinism "layout" share: one problem, cut for 1, 2, 4 and 8 ranks."""

from __future__ import annotations

import torch
import torch.distributed as dist

from pypar.testing import run_ranks

WORLDS = (1, 2, 4, 8)


def virtual_sizes(full: int, world: int) -> list[int]:
    """What each rank holds of a dim so that its part is made of whole virtual shards."""
    shards = [len(s) for s in torch.arange(full).tensor_split(8)]
    per = 8 // world
    return [sum(shards[r * per : (r + 1) * per]) for r in range(world)]


def mine(full: torch.Tensor, rank: int, world: int, dim: int) -> torch.Tensor:
    return full.split(virtual_sizes(full.shape[dim], world), dim)[rank]


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])


def differences(found: dict, wanted: dict, what: object) -> list[str]:
    assert found.keys() == wanted.keys()
    seen = []
    for name, tensor in wanted.items():
        assert found[name].shape == tensor.shape and found[name].dtype == tensor.dtype, (what, name)
        differ = (bits(found[name]) != bits(tensor)).sum().item()
        if differ:
            seen.append(f"{what}: {name} differs in {differ} of {tensor.numel()} elements")
    return seen


def whole(results: list[dict]) -> dict:
    """From what each rank returns, {(name, how): tensor}: how None is the same on every rank, a number is the dim along
    which the ranks hold parts, "sum" adds."""
    joined = {}
    for name, how in results[0]:
        parts = [r[name, how] for r in results]
        if how is None:
            for rank, part in enumerate(parts):
                assert torch.equal(bits(part), bits(parts[0])), f"{name} on rank {rank}"
            joined[name] = parts[0]
        else:
            joined[name] = sum(parts[1:], parts[0]) if how == "sum" else torch.cat(parts, how)
    return joined


def in_all_worlds(rank, _, fn):
    groups = {world: dist.new_group(list(range(world))) for world in WORLDS}
    return {world: fn(rank, world, group.group_name) for world, group in groups.items() if rank < world}


def check_all_worlds(fn) -> None:
    """fn(rank, world, group_name) -> {case: {(name, how): tensor}}, whose wholes have the same bits in every world."""
    results = run_ranks(in_all_worlds, max(WORLDS), fn)
    wanted, wrong = None, []
    for world in WORLDS:
        of_ranks = [r[world] for r in results[:world]]
        found = {case: whole([r[case] for r in of_ranks]) for case in of_ranks[0]}
        wanted = wanted or found
        assert found and found.keys() == wanted.keys()
        for case in wanted:
            wrong += differences(found[case], wanted[case], f"{case} on {world} ranks")
    assert not wrong, "\n".join(wrong)
