"""A pool of rank processes that take commands: what every bench in Python runs its variants in.

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
from bench.harness import Case

LIMIT_S = 120.0
PAGE_BYTES = 1 << 16


class Rank:
    """One rank: a single thread, `backend` as the default group, and the barrier. Benches add verify() and measure().

    Both take (variant, case, ...) and are called on all ranks at once; see Variant of the harness for what they return.
    """

    backend = "gloo"

    def __init__(self, rank: int, world: int, folder: str, page: str):
        self.rank, self.world, self.epoch = rank, world, 0
        torch.set_num_threads(1)
        store = dist.FileStore(str(Path(folder) / "store"), world)
        timeout = timedelta(seconds=LIMIT_S)
        dist.init_process_group(self.backend, store=store, rank=rank, world_size=world, timeout=timeout)
        with open(page, "r+b") as file:
            self.page = mmap.mmap(file.fileno(), PAGE_BYTES)
        self.counters = torch.frombuffer(self.page, dtype=torch.uint8).data_ptr()

    def barrier(self) -> None:
        self.epoch += 1
        if native.library().bench_barrier(self.counters, self.rank, self.world, self.epoch, LIMIT_S):
            raise TimeoutError(f"rank {self.rank}: a peer did not come to the barrier of the bench")

    def timed(self, run: Callable[[], Any], iters: int, num_samples: int) -> list[float]:
        """Microseconds of one run, of num_samples rows of `iters`, each begun by all ranks together."""
        us = []
        for _ in range(num_samples):
            self.barrier()
            start = time.perf_counter_ns()
            for _ in range(iters):
                run()
            us.append((time.perf_counter_ns() - start) / (1000 * iters))
        self.barrier()
        return us


def _rank_main(kind: type[Rank], rank: int, world: int, folder: str, page: str, args: tuple, pipe: Connection) -> None:
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    try:
        state = kind(rank, world, folder, page, *args)
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
    """W processes, each with a kind(rank, world, folder, page, *args) that does what it is asked.

    Started when first asked; after a failure they are killed, and started afresh.
    """

    def __init__(self, world: int, kind: type[Rank], *args: Any):
        self.world, self.kind, self.args = world, kind, args
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
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else torch.profiler announces every start and stop
        context = mp.get_context("spawn")
        self._folder = tempfile.TemporaryDirectory(prefix="pypar_bench_")
        self._page = os.memfd_create("pypar_bench")
        os.ftruncate(self._page, PAGE_BYTES)
        page = f"/proc/{os.getpid()}/fd/{self._page}"
        for rank in range(self.world):
            here, there = context.Pipe()
            args = (self.kind, rank, self.world, self._folder.name, page, self.args, there)
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
                try:
                    state, value = pipe.recv()
                except EOFError:
                    raise RuntimeError(f"rank {waiting[pipe]} died; was there too little memory?") from None
                if state != "ok":
                    raise RuntimeError(f"rank {waiting[pipe]}: {value.strip().splitlines()[-1]}")
                values[waiting[pipe]] = value
        return [values[rank] for rank in range(self.world)]


class PoolVariant:
    """A variant that the ranks of a pool know by its name; it shares the pool with others."""

    def __init__(self, name: str, pool: RankPool):
        self.name, self._pool = name, pool

    def skips(self, case: Case) -> bool:
        return False

    def verify(self, case: Case) -> str:
        return next(filter(None, self._pool.ask("verify", self.name, case)), "")

    def measure(self, case: Case, iters: int, num_samples: int) -> list[float]:
        by_rank = self._pool.ask("measure", self.name, case, iters, num_samples)
        return [max(us) for us in zip(*by_rank, strict=True)]
