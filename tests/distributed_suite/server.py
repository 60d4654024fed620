"""Runs tests of PyTorch's own distributed suite, each in its own processes, forked from one that has torch imported.

Importing torch three times per test is what makes the suite slow (19 minutes on gloo); a fork costs milliseconds. This
process stays single-threaded and starts no process group, so that a fork of it is as good as a fresh process.

Reads one JSON object per line {"test", "limit_s"}, answers one per line {"codes", "output", "seconds"}; the first line
it writes says {"tests": names of all tests}.

The suite asks for backends by name where it means a feature ("gloo" where it means CPU, "mpi" where it means CPU
all_to_all). So its decorators are evaluated under those names, and then the tests run under the name of the backend:
`BACKEND` of the module and of the environment is what init_process_group gets.
"""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import sys
import tempfile
import time
from pathlib import Path
from types import ModuleType
from typing import Any

WORLD_SIZE = 3
SUITE = "torch.testing._internal.distributed.distributed_test"


def load_suite(decorated_as: str, name: str) -> ModuleType:
    """The suite's module, its decorators evaluated for the backend `decorated_as`."""
    os.environ["BACKEND"] = decorated_as
    spec = importlib.util.find_spec(SUITE)
    assert spec is not None and spec.loader is not None
    spec.name = name
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    loader: Any = spec.loader
    loader.name = name
    loader.exec_module(module)

    class TestSpawn(module.TestDistBackend, module.DistributedTest._DistTestBase):  # type: ignore[name-defined]
        pass

    module.TestSpawn = TestSpawn  # type: ignore[attr-defined]
    return module


def tests_of(module: ModuleType) -> list[str]:
    return sorted(name for name in dir(module.TestSpawn) if name.startswith("test_"))


def adopt(modules: dict[str, ModuleType], backend: str) -> None:
    """Names `backend` wherever the suite or torch lists backends by name."""
    import torch.distributed as dist

    os.environ["BACKEND"] = backend
    for module in modules.values():
        module.BACKEND = backend  # type: ignore[attr-defined]
        for names in ("PROFILING_SUPPORTED_BACKENDS", "SEND_RECV_PROFILING_SUPPORTED_BACKENDS"):
            getattr(module, names).append(backend)

    def monitored_barrier(group=None, timeout=None, wait_all_ranks=False):
        # torch.distributed.monitored_barrier refuses every backend but gloo by name; the group's own method doesn't.
        from datetime import timedelta

        if dist.distributed_c10d._rank_not_in_group(group):
            return
        group = group or dist.group.WORLD
        if isinstance(timeout, float):
            timeout = timedelta(seconds=timeout)
        group.monitored_barrier(timeout or timedelta(minutes=30), wait_all_ranks=wait_all_ranks)

    if backend != "gloo":
        dist.monitored_barrier = monitored_barrier


def run_rank(module: ModuleType, rank: int, test: str, folder: Path, pipe: Any) -> int:
    os.environ["TEMP_DIR"] = str(folder)
    os.environ["INIT_METHOD"] = f"file://{folder}/init_dir/shared_init_file"
    module.INIT_METHOD = os.environ["INIT_METHOD"]  # type: ignore[attr-defined]
    if getattr(module.TestSpawn, test).__dict__.get("_needs_mpi_name"):
        os.environ["BACKEND"] = "mpi"
    try:
        module.TestSpawn._run(rank, test, str(folder / "store"), pipe)
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 1
    return 0


def run_test(module: ModuleType, test: str, limit_s: float) -> dict[str, Any]:
    import multiprocessing

    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="pypar_suite_") as name:
        folder = Path(name)
        for sub in ("barrier", "test_dir", "init_dir"):
            (folder / sub).mkdir()
        pids: dict[int, int] = {}
        pipes = []
        for rank in range(WORLD_SIZE):
            ours, theirs = multiprocessing.Pipe()
            pid = os.fork()
            if pid == 0:
                code = 1
                try:
                    output = os.open(folder / f"output.{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
                    os.dup2(output, 1)
                    os.dup2(output, 2)
                    code = run_rank(module, rank, test, folder, theirs)
                    sys.stdout.flush()
                    sys.stderr.flush()
                finally:
                    os._exit(code)
            theirs.close()
            pids[pid] = rank
            pipes.append(ours)
        codes: list[int | None] = [None] * WORLD_SIZE
        errors = [""] * WORLD_SIZE
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
            for rank in range(WORLD_SIZE):
                text = (folder / f"output.{rank}").read_text(errors="replace")
                output += f"--- rank {rank}, exit code {codes[rank]}\n{errors[rank]}\n{text[-6000:]}\n"
    return {"codes": codes, "output": output, "seconds": round(time.monotonic() - started, 2)}


def main(backend: str) -> None:
    protocol = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    os.environ.update(
        WORLD_SIZE=str(WORLD_SIZE), INIT_METHOD="file:///set/by/each/test", MASTER_ADDR="127.0.0.1", OMP_NUM_THREADS="1"
    )
    modules = {as_name: load_suite(as_name, f"pypar_suite_{as_name}") for as_name in ("gloo", "mpi")}
    if backend == "pypar":
        import pypar  # noqa: F401
    adopt(modules, backend)
    print(json.dumps({"tests": tests_of(modules["gloo"])}), file=protocol, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        module = modules[request.get("as", "gloo")]
        print(json.dumps(run_test(module, request["test"], request["limit_s"])), file=protocol, flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
