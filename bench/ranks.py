"""Collectives from Python: gloo and pypar, in one pair (or W) of processes that hold a group of each."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from bench.harness import ALONE_BYTES, Case
from bench.pool import LIMIT_S, PoolVariant, Rank

# Variant name -> (group, interface, symmetric memory?, output in a new tensor?)
VARIANTS = {
    "gloo": ("gloo", "dist", False, False),
    "pypar dist": ("pypar", "dist", False, False),
    "pypar dist symmetric": ("pypar", "dist", True, False),
    "pypar op": ("pypar", "op", False, False),
    "pypar op new tensor": ("pypar", "op", False, True),
    "pypar op symmetric": ("pypar", "op", True, False),
}
NEW_TENSOR = ("all_reduce", "reduce_scatter", "all_gather")


def variants_of(op: str) -> list[str]:
    """Which of VARIANTS there are for an op: send goes through torch.distributed only."""
    if op == "send":
        return ["gloo", "pypar dist", "pypar dist symmetric"]
    names = ["gloo", "pypar dist", "pypar op", "pypar op symmetric"]
    return [*names, "pypar op new tensor"] if op in NEW_TENSOR else names


def usable() -> list[str]:
    """The variants that this installation has: gloo always, ops with the extension, the group once it is registered."""
    import pypar

    with_op, with_group = pypar.backend.available(), "pypar" in dist.Backend.backend_list
    has = {("gloo", "dist"): True, ("pypar", "op"): with_op, ("pypar", "dist"): with_op and with_group}
    return [name for name, (group, interface, *_) in VARIANTS.items() if has[group, interface]]


def element(rank: int, index: torch.Tensor, salt: int) -> torch.Tensor:
    """Small integers, as in bench.h: every sum is exact, and no two neighbours agree."""
    return ((rank + 1) * (1 + (index + salt) % 1021)).float()


class CollectiveRank(Rank):
    """What one rank holds: the groups, and two tensors of ordinary and two of symmetric memory."""

    def __init__(self, rank: int, world: int, folder: str, page: str, max_bytes: int, has_pypar: bool):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[rank % len(cores)]})  # before any thread of a group is there
        super().__init__(rank, world, folder, page)
        self.salt = 0
        self.groups: dict[str, Any] = {"gloo": dist.group.WORLD}
        num = max_bytes // 4
        self.memory = {False: (torch.zeros(num), torch.zeros(num))}
        if has_pypar:
            from torch.distributed import _symmetric_memory as symmetric

            import pypar  # noqa: F401  (registers the backend)

            backend = "pypar" if "pypar" in dist.Backend.backend_list else "gloo"  # the ops go by the name of any group
            self.groups["pypar"] = dist.new_group(backend=backend, timeout=timedelta(seconds=LIMIT_S))
            name = self.groups["pypar"].group_name
            pair = [symmetric.empty(num, dtype=torch.float32, device=torch.device("cpu")).zero_() for _ in range(2)]
            self.handles = [symmetric.rendezvous(tensor, name) for tensor in pair]
            self.memory[True] = (pair[0], pair[1])

    def prepare(self, variant: str, case: Case) -> tuple[Callable[[int], Any], torch.Tensor, torch.Tensor]:
        """(run(root) -> the result or None, the input, where the result lies)."""
        group_name, interface, symmetric, new = VARIANTS[variant]
        num, part = case.nbytes // 4, case.nbytes // 4 // self.world
        first, second = self.memory[symmetric]
        x = first[: part if case.op == "all_gather" else num]
        out = second[: part if case.op == "reduce_scatter" else num]
        where = x if case.op in ("all_reduce", "broadcast") else out
        group = self.groups[group_name]
        if interface == "dist":
            return self._through_dist(case.op, x, out, group), x, where
        return self._through_ops(case.op, x, out, group.group_name, new), x, where

    def _through_dist(self, op: str, x: torch.Tensor, out: torch.Tensor, group: Any) -> Callable[[int], Any]:
        peer = self.rank ^ 1

        def there_and_back(root: int) -> None:
            if self.rank % 2 == 0:
                dist.send(x, peer, group=group)
                dist.recv(out, peer, group=group)
            else:
                dist.recv(out, peer, group=group)
                dist.send(x, peer, group=group)

        return {
            "all_reduce": lambda root: dist.all_reduce(x, group=group),
            "reduce_scatter": lambda root: dist.reduce_scatter_single(out, x, group=group),
            "all_gather": lambda root: dist.all_gather_single(out, x, group=group),
            "all_to_all": lambda root: dist.all_to_all_single(out, x, group=group),
            "broadcast": lambda root: dist.broadcast(x, root, group=group),
            "send": there_and_back,
        }[op]

    def _through_ops(self, op: str, x: torch.Tensor, out: torch.Tensor, name: str, new: bool) -> Callable[[int], Any]:
        ops = torch.ops.pypar
        if new:
            return {
                "all_reduce": lambda root: ops.all_reduce(x, "sum", name),
                "reduce_scatter": lambda root: ops.reduce_scatter(x, "sum", name),
                "all_gather": lambda root: ops.all_gather(x, name),
            }[op]
        splits = [x.numel() // self.world] * self.world
        return {
            "all_reduce": lambda root: ops.all_reduce_(x, "sum", name),
            "reduce_scatter": lambda root: ops.reduce_scatter_out(out, x, "sum", name),
            "all_gather": lambda root: ops.all_gather_out(out, x, name),
            "all_to_all": lambda root: ops.all_to_all_out(out, x, splits, splits, name),
            "broadcast": lambda root: ops.broadcast_(x, root, name),
        }[op]

    def verify(self, variant: str, case: Case) -> str:
        run, x, where = self.prepare(variant, case)
        self.salt += 1
        root, part = self.salt % self.world, case.nbytes // 4 // self.world
        x.copy_(element(self.rank, torch.arange(x.numel()), self.salt))
        if where is not x:
            where.fill_(-1)
        self.barrier()
        result = run(root)
        got = result if isinstance(result, torch.Tensor) else where
        want = self.expected(case.op, case.nbytes // 4, part, root)
        self.barrier()
        if got.shape != want.shape:
            return f"rank {self.rank}: shape {tuple(got.shape)}, expected {tuple(want.shape)}"
        differs = (got != want).nonzero()
        if differs.numel() == 0:
            return ""
        i = int(differs[0])
        return f"rank {self.rank}: element {i} of {case.op} is {got[i]:g}, expected {want[i]:g}"

    def expected(self, op: str, num: int, part: int, root: int) -> torch.Tensor:
        ranks, index = range(self.world), torch.arange(num)
        mine = self.rank * part + torch.arange(part)
        if op == "all_reduce":
            return torch.stack([element(r, index, self.salt) for r in ranks]).sum(0)
        if op == "reduce_scatter":
            return torch.stack([element(r, mine, self.salt) for r in ranks]).sum(0)
        if op == "all_gather":
            return torch.cat([element(r, torch.arange(part), self.salt) for r in ranks])
        if op == "all_to_all":
            return torch.cat([element(r, mine, self.salt) for r in ranks])
        return element(root if op == "broadcast" else self.rank ^ 1, index, self.salt)

    def measure(self, variant: str, case: Case, iters: int, num_samples: int) -> list[float]:
        """As measure() of bench.h: from ALONE_BYTES up every op on a buffer that was just rewritten, untimed."""
        run, x, _ = self.prepare(variant, case)
        divisor = 1000 * iters * (2 if case.op == "send" else 1)
        us = []
        for sample in range(num_samples):
            if case.nbytes >= ALONE_BYTES or sample == 0:
                x.fill_(self.rank + sample + 1)
            roots = [(sample + k) % self.world for k in range(iters)]
            self.barrier()
            start = time.perf_counter_ns()
            for root in roots:
                run(root)
            us.append((time.perf_counter_ns() - start) / divisor)
        self.barrier()
        return us


class CollectiveVariant(PoolVariant):
    """One of VARIANTS."""

    def skips(self, case: Case) -> bool:
        return self.name not in variants_of(case.op) or (case.op == "send" and case.ranks % 2 == 1)
