"""C sources of the benches, compiled when first needed into build/bench, and the latency probe among them."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import math
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCES = Path(__file__).resolve().parent / "c"
BUILD = ROOT / "build" / "bench"
FLAGS = ["-D_GNU_SOURCE", "-O3", "-march=native", "-Wall", "-Wextra"]
FAST_LINE_NS = 120.0  # below: the two cores share a last-level cache


class BuildError(RuntimeError):
    """A C source of a bench does not compile here."""


def build(source: str, compiler: Sequence[str] = ("cc",), flags: Sequence[str] = (), suffix: str = "") -> Path:
    """Compiles bench/c/<source> unless this source with this compiler and these flags is there already."""
    command = [*compiler, *FLAGS, str(SOURCES / source), *flags]
    key = hashlib.sha256(" ".join(command).encode())
    for path in [SOURCES / source, *sorted(SOURCES.glob("*.h"))]:
        key.update(path.read_bytes())
    target = BUILD / f"{Path(source).stem}{suffix}-{key.hexdigest()[:12]}"
    if target.exists():
        return target
    BUILD.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f"{target.name}.{os.getpid()}")  # another process may be building the same
    try:
        done = subprocess.run([*command, "-o", str(part)], capture_output=True, text=True)
    except FileNotFoundError as error:
        raise BuildError(f"no compiler {command[0]!r}") from error
    if done.returncode != 0:
        raise BuildError(f"{source}: {done.stderr.strip()[-600:]}")
    part.rename(target)
    return target


@functools.cache
def library() -> ctypes.CDLL:
    """probe.c as a library: line_latency_ns and bench_barrier."""
    lib = ctypes.CDLL(str(build("probe.c", flags=["-shared", "-fPIC", "-lpthread"])))
    lib.line_latency_ns.restype = ctypes.c_double
    lib.line_latency_ns.argtypes = [ctypes.c_int] * 3
    lib.bench_barrier.restype = ctypes.c_int
    lib.bench_barrier.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_int, ctypes.c_uint32, ctypes.c_double]
    return lib


def line_latency_ns(rounds: int = 4000) -> float:
    """One-way latency of a cache line between the first two cores that this process may use; NaN with one core."""
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        return math.nan
    ns = library().line_latency_ns(cores[0], cores[1], rounds)
    return ns if ns > 0 else math.nan


def regime(before_ns: float, after_ns: float) -> str:
    """fast: the cores share a cache; slow: they don't; mixed: it changed meanwhile; one core: nothing to probe."""
    if math.isnan(before_ns) or math.isnan(after_ns):
        return "one core"
    names = {"fast" if ns < FAST_LINE_NS else "slow" for ns in (before_ns, after_ns)}
    return names.pop() if len(names) == 1 else "mixed"
