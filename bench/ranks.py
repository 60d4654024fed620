"""Variants that are Python: gloo and pypar, in one pair (or W) of processes that hold a group of each.

The ranks wait for commands at a pipe, so that an idle pool costs nothing. The clock starts behind a barrier in shared
memory (probe.c), the same for every variant.
"""

from __future__ import annotations

import mmap
import os
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from bench import native
from bench.harness import ALONE_BYTES, Case

LIMIT_S = 120.0
PAGE_BYTES = 1 << 16

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


class RankState:
    """What one rank holds: the groups, and two tensors of ordinary and two of symmetric memory."""

    def __init__(self, rank: int, world: int, folder: str, page: str, max_bytes: int, has_pypar: bool):
        self.rank, self.world, self.salt, self.epoch = rank, world, 0, 0
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[rank % len(cores)]})
        torch.set_num_threads(1)
        store = dist.FileStore(str(Path(folder) / "store"), world)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=LIMIT_S))
        self.groups: dict[str, Any] = {"gloo": dist.group.WORLD}
        with open(page, "r+b") as file:
            self.page = mmap.mmap(file.fileno(), PAGE_BYTES)
        self.counters = torch.frombuffer(self.page, dtype=torch.uint8).data_ptr()
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

    def barrier(self) -> None:
        self.epoch += 1
        if native.library().bench_barrier(self.counters, self.rank, self.world, self.epoch, LIMIT_S):
            raise TimeoutError(f"rank {self.rank}: a peer did not come to the barrier of the bench")

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


def _rank_main(rank: int, world: int, folder: str, page: str, max_bytes: int, has_pypar: bool, pipe: Connection):
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    try:
        state = RankState(rank, world, folder, page, max_bytes, has_pypar)
        pipe.send(("ok", None))
        while (command := pipe.recv()) is not None:
            what, *args = command
            pipe.send(("ok", getattr(state, what)(*args)))
    except EOFError:
        pass
    except BaseException:
        pipe.send(("error", traceback.format_exc()))
    os._exit(0)  # no orderly end of groups: a peer may be gone already


class RankPool:
    """The W processes. Started when first asked; after a failure they are killed, and started afresh."""

    def __init__(self, world: int, max_bytes: int, has_pypar: bool):
        self.world, self.max_bytes, self.has_pypar = world, max_bytes, has_pypar
        self._processes: list[Any] = []
        self._pipes: list[Connection] = []
        self._page = -1
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def ask(self, *command: Any) -> list[Any]:
        """The answer of every rank, by rank."""
        try:
            if not self._processes:
                self._start()
            for pipe in self._pipes:
                pipe.send(command)
            return self._answers()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.kill()  # they hold nothing that needs an orderly end
            process.join()
        if self._page >= 0:
            os.close(self._page)
        if self._folder is not None:
            self._folder.cleanup()
        self._processes, self._pipes, self._page, self._folder = [], [], -1, None

    def _start(self) -> None:
        native.library()  # compiled once, before the ranks ask for it
        context = mp.get_context("spawn")
        self._folder = tempfile.TemporaryDirectory(prefix="pypar_bench_")
        self._page = os.memfd_create("pypar_bench")
        os.ftruncate(self._page, PAGE_BYTES)
        page = f"/proc/{os.getpid()}/fd/{self._page}"
        for rank in range(self.world):
            here, there = context.Pipe()
            args = (rank, self.world, self._folder.name, page, self.max_bytes, self.has_pypar, there)
            self._processes.append(context.Process(target=_rank_main, args=args, daemon=True))
            self._processes[-1].start()
            self._pipes.append(here)
            there.close()
        self._answers()

    def _answers(self) -> list[Any]:
        deadline = time.monotonic() + 2 * LIMIT_S
        values: dict[int, Any] = {}
        while len(values) < self.world:  # in the order in which they come: an error first, then who waits for that rank
            waiting = {pipe: rank for rank, pipe in enumerate(self._pipes) if rank not in values}
            ready = wait(list(waiting), max(0.0, deadline - time.monotonic()))
            if not ready:
                raise TimeoutError(f"no answer from ranks {sorted(waiting.values())}")
            for pipe in ready:
                assert isinstance(pipe, Connection)
                state, value = pipe.recv()
                if state != "ok":
                    raise RuntimeError(f"rank {waiting[pipe]}: {value.strip().splitlines()[-1]}")
                values[waiting[pipe]] = value
        return [values[rank] for rank in range(self.world)]


class RankVariant:
    """One of VARIANTS, in a pool that it shares with the others."""

    def __init__(self, name: str, pool: RankPool):
        self.name, self._pool = name, pool

    def skips(self, case: Case) -> bool:
        return self.name not in variants_of(case.op) or (case.op == "send" and case.ranks % 2 == 1)

    def verify(self, case: Case) -> str:
        return next(filter(None, self._pool.ask("verify", self.name, case)), "")

    def measure(self, case: Case, iters: int, num_samples: int) -> list[float]:
        by_rank = self._pool.ask("measure", self.name, case, iters, num_samples)
        return [max(us) for us in zip(*by_rank, strict=True)]
