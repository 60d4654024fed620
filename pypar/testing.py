"""Run a function on several ranks: what the tests, the benches and users' own tests call."""

from __future__ import annotations

import os
import pickle
import signal
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


class RankFailed(RuntimeError):
    """A rank of run_ranks raised, died or ran past the time limit. `.failures`: {rank: text}."""

    def __init__(self, failures: dict[int, str]):
        self.failures = failures
        super().__init__("\n".join(f"--- rank {rank}:\n{text}" for rank, text in sorted(failures.items())))


def _context() -> Any:
    """Starts ranks from a server process that has torch imported already: 0.1 s a rank instead of seconds.

    The server runs nothing but imports, so that a rank begins as clean as a spawned process.
    """
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torch.distributed", "pypar"])
    return context


def _rank_main(
    rank: int,
    world_size: int,
    folder: str,
    backend: str,
    timeout_s: float,
    environment: dict[str, str],
    fn: Callable,
    args: tuple,
) -> None:
    os.environ.clear()
    os.environ.update(environment)  # the server's is as old as the server
    torch.set_num_threads(1)
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    out = Path(folder) / f"out.{rank}"
    try:
        import pypar  # noqa: F401  (registers the backend)

        if backend != "none":
            store = dist.FileStore(str(Path(folder) / "store"), world_size)
            dist.init_process_group(
                backend, store=store, rank=rank, world_size=world_size, timeout=timedelta(seconds=timeout_s)
            )
        result = fn(rank, world_size, *args)
        payload = pickle.dumps(("ok", result))
    except BaseException:
        payload = pickle.dumps(("error", traceback.format_exc()))
    Path(f"{out}.tmp").write_bytes(payload)
    Path(f"{out}.tmp").rename(out)
    if dist.is_initialized() and pickle.loads(payload)[0] == "ok":
        dist.destroy_process_group()
    os._exit(0 if pickle.loads(payload)[0] == "ok" else 1)


@contextmanager
def stalls(seed: int, most_us: int = 300) -> Iterator[None]:
    """Within the block, this rank sleeps for up to most_us microseconds before one in four of the signals that it gives
    or has waited for in shared memory: in other places for another seed, in the same ones for the same.

    For a test that results don't depend on timing. Raises RuntimeError where the compiled extension is absent.
    """
    from pypar import backend

    if backend.extension is None:
        raise RuntimeError("stalls need the compiled extension; without it pypar has no signals of its own")
    backend.extension.set_stalls(seed, most_us)
    try:
        yield
    finally:
        backend.extension.set_stalls(0, 0)


def run_ranks(
    fn: Callable[..., Any],
    world_size: int,
    *args: Any,
    backend: str = "pypar",
    timeout_s: float = 60.0,
    limit_s: float = 240.0,
    expect_failure: bool = False,
) -> list[Any]:
    """Runs fn(rank, world_size, *args) in world_size processes of their own and returns their results, by rank.

    fn must be a module-level function; arguments and results are pickled (tensors included).
    backend: given to init_process_group with a FileStore (no port); "none" starts no process group.
    timeout_s: of the group's waits. limit_s: of the whole; past it the ranks are killed.
    expect_failure: return {rank: text of its exception} as the last element instead of raising.
    Raises RankFailed with every failed rank's traceback.
    """
    context = _context()
    with tempfile.TemporaryDirectory(prefix="pypar_ranks_") as folder:
        ranks = [
            context.Process(
                target=_rank_main,
                args=(rank, world_size, folder, backend, timeout_s, dict(os.environ), fn, args),
                daemon=False,
            )
            for rank in range(world_size)
        ]
        for process in ranks:
            process.start()
        deadline = time.monotonic() + limit_s
        late: set[int] = set()
        for rank, process in enumerate(ranks):
            process.join(max(0.0, deadline - time.monotonic()))
            if process.is_alive():
                late.add(rank)
        for rank in late:
            pid = ranks[rank].pid
            assert pid is not None
            os.kill(pid, signal.SIGKILL)
            ranks[rank].join()
        results: list[Any] = [None] * world_size
        failures: dict[int, str] = {}
        for rank, process in enumerate(ranks):
            path = Path(folder) / f"out.{rank}"
            if path.exists():
                state, value = pickle.loads(path.read_bytes())
                if state == "ok":
                    results[rank] = value
                else:
                    failures[rank] = value
            elif rank in late:
                failures[rank] = f"ran past the limit of {limit_s} s and was killed"
            else:
                failures[rank] = f"died with exit code {process.exitcode}"
    if expect_failure:
        return [*results, failures]
    if failures:
        raise RankFailed(failures)
    return results
