"""Runs tests of PyTorch's own distributed suite, each in its own processes, forked from one that has torch imported.

Importing torch three times per test is what makes the suite slow (19 minutes on gloo); a fork costs milliseconds. This
process stays single-threaded and starts no process group, so that a fork of it is as good as a fresh process.

Reads one JSON object per line {"test", "world_size", "limit_s"}, answers one per line {"codes", "output", "seconds"};
the first line it writes says {"tests": {name: decorators}}.

Methods are called directly, so that unittest's skip marks, which ask for backends by name ("only gloo", "only MPI"), do
not count: skips.txt decides what can't run, and why. What a test asks in its body (GPUs, world size) still ends it with
an exit code of its own, which is a failure here.
"""

from __future__ import annotations

import importlib
import inspect
import json
import multiprocessing
import os
import signal
import sys
import tempfile
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

SUITE = "torch.testing._internal.distributed.distributed_test"


def load_suite() -> Any:
    """The class of the tests, runnable."""
    suite = importlib.import_module(SUITE)

    class TestSpawn(suite.TestDistBackend, suite.DistributedTest._DistTestBase):  # type: ignore[misc,name-defined]
        pass

    return TestSpawn


def decorators_of(tests: Any) -> dict[str, str]:
    """The decorators of each test, as text: what skips.txt is checked against."""
    found = {}
    for name in sorted(dir(tests)):
        if name.startswith("test_"):
            source = inspect.getsource(inspect.unwrap(getattr(tests, name)))
            found[name] = source[: source.index("def ")]
    return found


class CpuBackend(str):
    """The name of a backend, also where the suite says "gloo" and means: one that takes CPU tensors."""

    def __eq__(self, other: object) -> bool:
        return str.__eq__(self, other) is True or other == "gloo"

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = str.__hash__


def adopt(backend: str) -> None:
    """Names `backend` where the suite and torch list backends by name for what they can do."""
    import torch.distributed as dist

    suite: Any = sys.modules[SUITE]
    suite.BACKEND = CpuBackend(backend)
    for names in ("PROFILING_SUPPORTED_BACKENDS", "SEND_RECV_PROFILING_SUPPORTED_BACKENDS"):
        getattr(suite, names).append(backend)

    def monitored_barrier(group=None, timeout=None, wait_all_ranks=False):
        # torch.distributed.monitored_barrier refuses every backend but gloo by name; the group's own method doesn't.
        if dist.distributed_c10d._rank_not_in_group(group):
            return
        group = group or dist.group.WORLD
        if isinstance(timeout, float):
            timeout = timedelta(seconds=timeout)
        group.monitored_barrier(timeout or timedelta(minutes=30), wait_all_ranks=wait_all_ranks)

    def logging_data(self):
        # DDP's log calls every backend that c10d doesn't ship "custom".
        return {k: backend if (k, v) == ("backend_name", "custom") else v for k, v in original(self).items()}

    if backend != "gloo":
        dist.monitored_barrier = monitored_barrier
        original = suite.DistributedDataParallel._get_ddp_logging_data
        suite.DistributedDataParallel._get_ddp_logging_data = logging_data


def run_rank(tests: Any, rank: int, world_size: int, test: str, folder: Path, pipe: Any) -> int:
    os.environ["WORLD_SIZE"] = str(world_size)
    os.environ["TEMP_DIR"] = str(folder)
    os.environ["INIT_METHOD"] = f"file://{folder}/init_dir/shared_init_file"
    sys.modules[SUITE].INIT_METHOD = os.environ["INIT_METHOD"]  # type: ignore[attr-defined]
    # skip_if_small_worldsize lets only MPI run on fewer than 8 ranks, by name, though the groups of these tests are
    # ranks 1 and 2. The environment is read by that decorator alone; the group is opened with the suite's BACKEND.
    os.environ["BACKEND"] = "mpi"
    try:
        tests._run(rank, test, str(folder / "store"), pipe)
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 1
    return 0


def run_test(tests: Any, test: str, world_size: int, limit_s: float) -> dict[str, Any]:
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="pypar_suite_") as name:
        folder = Path(name)
        for sub in ("barrier", "test_dir", "init_dir"):
            (folder / sub).mkdir()
        pids: dict[int, int] = {}
        pipes = []
        for rank in range(world_size):
            ours, theirs = multiprocessing.Pipe()
            pid = os.fork()
            if pid == 0:
                code = 1
                try:
                    output = os.open(folder / f"output.{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
                    os.dup2(output, 1)
                    os.dup2(output, 2)
                    code = run_rank(tests, rank, world_size, test, folder, theirs)
                    sys.stdout.flush()
                    sys.stderr.flush()
                finally:
                    os._exit(code)
            theirs.close()
            pids[pid] = rank
            pipes.append(ours)
        codes: list[int | None] = [None] * world_size
        errors = [""] * world_size
        first_failure = 0.0
        while pids:
            for pid in list(pids):
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    codes[pids.pop(pid)] = os.waitstatus_to_exitcode(status)
            for rank, pipe in enumerate(pipes):
                try:
                    while pipe.poll():
                        errors[rank] += str(pipe.recv())
                except (EOFError, OSError):
                    pass
            now = time.monotonic()
            if not first_failure and any(code not in (None, 0) for code in codes):
                first_failure = now
            if now - started > limit_s or (first_failure and now - first_failure > 10):
                for pid in pids:
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.005)
        output = ""
        if any(codes):
            for rank in range(world_size):
                text = (folder / f"output.{rank}").read_text(errors="replace")
                output += f"--- rank {rank}, exit code {codes[rank]}\n{errors[rank]}\n{text[-6000:]}\n"
    return {"codes": codes, "output": output, "seconds": round(time.monotonic() - started, 2)}


def main(backend: str) -> None:
    protocol = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    os.environ.update(
        BACKEND=backend,
        WORLD_SIZE="3",
        INIT_METHOD="file:///set/by/each/test",
        MASTER_ADDR="127.0.0.1",
        OMP_NUM_THREADS="1",
    )
    if backend == "pypar":
        import pypar  # noqa: F401  (registers the backend)
    tests = load_suite()
    adopt(backend)
    print(json.dumps({"tests": decorators_of(tests)}), file=protocol, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        print(json.dumps(run_test(tests, **request)), file=protocol, flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
