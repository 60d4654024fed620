"""Variants that are C programs: the references and the peers (MPI libraries, oneCCL). See bench/c/bench.h.

A program starts when it is first needed, reads commands and answers with JSON lines. While it is not being timed its
ranks are stopped (SIGSTOP), so that no thread of it, such as oneCCL's workers, takes time from the others.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from bench import native
from bench.harness import Case

CONTROL_BYTES = 1 << 20
LIMIT_S = 300.0


class Program:
    """W processes of one C program. command(control path, max bytes, data path) gives what to start: one mpirun, or W
    processes."""

    def __init__(
        self,
        name: str,
        ranks: int,
        max_bytes: int,
        command: Callable[[str, str, str], list[list[str]]],
        env: dict[str, str] | None = None,
        data_bytes: int = 0,
    ):
        self.name, self.ranks, self.max_bytes = name, ranks, max_bytes
        self._command, self._data_bytes = command, data_bytes
        self._env = {**os.environ, **(env or {})}
        self._processes: list[subprocess.Popen[bytes]] = []
        self._pids: list[int] = []
        self._pages: list[int] = []
        self._text = b""

    def close(self) -> None:
        if self._processes:
            with contextlib.suppress(OSError):
                self._signal(signal.SIGCONT)
                self._write("quit\n")
        deadline = time.monotonic() + 5
        for process in self._processes:
            try:
                process.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                with contextlib.suppress(OSError):
                    self._signal(signal.SIGKILL)
                process.kill()
                process.wait()
        for fd in self._pages:
            os.close(fd)
        self._processes, self._pids, self._pages, self._text = [], [], [], b""

    def _page(self, nbytes: int) -> str:
        fd = os.memfd_create("pypar_bench")
        os.ftruncate(fd, nbytes)
        self._pages.append(fd)
        return f"/proc/{os.getpid()}/fd/{fd}"

    def _start(self) -> None:
        commands = self._command(self._page(CONTROL_BYTES), str(self.max_bytes), self._page(max(1, self._data_bytes)))
        for k, command in enumerate(commands):
            first = k == 0
            self._processes.append(
                subprocess.Popen(
                    command,
                    env=self._env,
                    stdin=subprocess.PIPE if first else subprocess.DEVNULL,
                    stdout=subprocess.PIPE if first else subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                )
            )
        self._pids = self._read()["pids"]

    def ask(self, command: str) -> dict:
        try:
            if self._processes:
                self._signal(signal.SIGCONT)
            else:
                self._start()
            self._write(command + "\n")
            answer = self._read()
            self._signal(signal.SIGSTOP)
        except BaseException:
            self.close()
            raise
        if "us" not in answer and answer.get("error", "").startswith("not offered"):
            raise ValueError(f"{self.name}: {answer['error']}")
        return answer

    def _signal(self, number: int) -> None:
        for pid in self._pids:
            os.kill(pid, number)

    def _write(self, text: str) -> None:
        stdin = self._processes[0].stdin
        assert stdin is not None
        stdin.write(text.encode())
        stdin.flush()

    def _read(self) -> dict:
        """The next line that is JSON; libraries print warnings on stdout, too."""
        stdout = self._processes[0].stdout
        assert stdout is not None
        deadline = time.monotonic() + LIMIT_S
        while True:
            while b"\n" in self._text:
                line, self._text = self._text.split(b"\n", 1)
                if line.startswith(b"{"):
                    return json.loads(line)
            ready, _, _ = select.select([stdout], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                raise TimeoutError(f"{self.name} did not answer within {LIMIT_S:.0f} s")
            part = os.read(stdout.fileno(), 1 << 16)
            if not part:
                raise RuntimeError(f"{self.name} ended with exit code {self._processes[0].wait()}")
            self._text += part


class ProgramVariant:
    """What a program offers to a bench. ops: {op of the case: op of the program}."""

    def __init__(self, name: str, program: Program, ops: dict[str, str]):
        self.name, self.program, self.choice = name, program, ""
        self._ops = ops

    def skips(self, case: Case) -> bool:
        return case.op not in self._ops or case.ranks != self.program.ranks or case.dtype != "float32"

    def verify(self, case: Case) -> str:
        return self.program.ask(f"verify {self._ops[case.op]} {case.nbytes}")["error"]

    def measure(self, case: Case, iters: int, num_samples: int) -> list[float]:
        answer = self.program.ask(f"time {self._ops[case.op]} {case.nbytes} {iters} {num_samples}")
        self.choice = answer["choice"] if answer["choice"] != "default" else ""
        return answer["us"]

    def tune(self, case: Case) -> dict[str, float]:
        """Microseconds of every configuration that a reference can choose from."""
        return self.program.ask(f"tune {self._ops[case.op]} {case.nbytes}")["configs"]


REFERENCE_OPS = {op: op for op in ("all_reduce", "reduce_scatter", "all_gather", "all_to_all", "broadcast", "send")}
OUT_OF_PLACE = {"all_reduce": "all_reduce_out"}


def reference(kind: str, ranks: int, max_bytes: int) -> ProgramVariant:
    """kind: staged (ordinary tensors) or symmetric."""
    path = native.build(f"reference_{kind}.c")

    def command(control: str, size: str, data: str) -> list[list[str]]:
        return [[str(path), control, size, data, str(rank), str(ranks)] for rank in range(ranks)]

    data_bytes = (1 << 20) + ranks * max(2 * (max_bytes + 4096), 32 << 20)
    program = Program(f"reference {kind}", ranks, max_bytes, command, data_bytes=data_bytes)
    return ProgramVariant(program.name, program, REFERENCE_OPS)


def _launcher(name: str) -> str:
    found = shutil.which(name)
    if found is None:
        raise native.BuildError(f"no {name}")
    return found


def _intel_prefix(needed: Sequence[str]) -> Path:
    """The environment that holds the wheels of Intel MPI and oneCCL: this one."""
    prefix = Path(sys.prefix)
    for file in needed:
        if not (prefix / file).exists():
            raise native.BuildError(f"no {file} in this environment (pip install impi-devel oneccl-devel)")
    return prefix


def _open_mpi() -> tuple[Path, list[str], dict[str, str]]:
    run = [_launcher("mpirun.openmpi"), "--bind-to", "none", "--oversubscribe"]
    env = {"OMPI_MCA_mpi_yield_when_idle": "0"}
    if os.geteuid() == 0:
        env |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    return native.build("peer_mpi.c", ["mpicc.openmpi"], suffix="-openmpi"), run, env


def _mpich() -> tuple[Path, list[str], dict[str, str]]:
    return native.build("peer_mpi.c", ["mpicc.mpich"], suffix="-mpich"), [_launcher("mpirun.mpich")], {}


def _intel_mpi() -> tuple[Path, list[str], dict[str, str]]:
    prefix = _intel_prefix(["include/mpi.h", "lib/libmpi.so.12", "bin/mpiexec.hydra"])
    flags = [f"-I{prefix}/include", f"-L{prefix}/lib", f"-Wl,-rpath,{prefix}/lib", "-l:libmpi.so.12"]
    env = {"I_MPI_PIN": "0", "I_MPI_FABRICS": "shm"}
    return native.build("peer_mpi.c", flags=flags, suffix="-impi"), [str(prefix / "bin/mpiexec.hydra")], env


def _oneccl() -> tuple[Path, list[str], dict[str, str]]:
    """The CPU library of oneCCL over Intel MPI. Its worker would take the core from its own rank: no offload."""
    needed = ["include/oneapi/ccl.hpp", "lib/ccl/cpu/lib/libccl.a", "lib/libintlc.so.5", "bin/mpiexec.hydra"]
    prefix = _intel_prefix(needed)
    runtime = [f"-l:{name}" for name in ("libintlc.so.5", "libsvml.so", "libimf.so", "libirng.so", "libhwloc.so.15")]
    flags = [f"-I{prefix}/include", str(prefix / needed[1]), f"-L{prefix}/lib", f"-Wl,-rpath,{prefix}/lib", *runtime]
    path = native.build("peer_oneccl.cpp", ["g++", "-std=c++17"], [*flags, "-lpthread", "-ldl", "-lrt"])
    env = {"CCL_ATL_TRANSPORT": "mpi", "CCL_WORKER_OFFLOAD": "0", "CCL_YIELD": "sched_yield", "I_MPI_PIN": "0"}
    return path, [str(prefix / "bin/mpiexec.hydra")], env | {"I_MPI_FABRICS": "shm"}


PEERS = {"OpenMPI": _open_mpi, "MPICH": _mpich, "Intel MPI": _intel_mpi, "oneCCL": _oneccl}


def peers(ranks: int, max_bytes: int, say: Callable[[str], None]) -> Iterator[ProgramVariant]:
    """Every peer that is here; say is told why another one isn't. all_reduce both in place and out of place."""
    for name, find in PEERS.items():
        try:
            path, run, env = find()
        except native.BuildError as error:
            say(f"{name}: skipped, {error}")
            continue

        def command(control: str, size: str, data: str, path: Path = path, run: Sequence[str] = run) -> list[list[str]]:
            return [[*run, "-n", str(ranks), str(path), control, size]]

        program = Program(name, ranks, max_bytes, command, env)
        yield ProgramVariant(name, program, REFERENCE_OPS)
        yield ProgramVariant(f"{name} out of place", program, OUT_OF_PLACE)
