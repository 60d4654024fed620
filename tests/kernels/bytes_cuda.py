"""Bytes that the CUDA kernels load and store, counted in the emulation: every access, as the compiler tells of it.

emulation/bytes_moved.cpp is compiled with -fsanitize=thread and linked with emulation/count_accesses.cpp in the place
of ThreadSanitizer, so that the kernels have nothing in them for it.
"""

from __future__ import annotations

import functools
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

from kernels import bytes_least as least
from kernels.bytes_least import Least, Moved
from kernels.cuda_executor import COMPILER, EMULATION, FLAGS, INCLUDES

NUMEL = 20002  # no multiple of 16 bytes, of ranks or of blocks
WORLD = 2
ITEM = {"float32": 4, "bfloat16": 2}
LEAST: dict[str, Callable[[int, int, int], Least]] = {
    "one_shot_all_reduce": least.all_reduce,
    "two_shot_all_reduce": least.all_reduce,
    "reduce_scatter": least.reduce_scatter,
    "all_gather": least.all_gather,
    "all_gather_copied": least.gather_in_place,
    "zero_scatter": least.zero_scatter,
    "zero_step": least.zero_step,
    "ring": least.ring,
}


def build(folder: Path, mutated: Path | None = None) -> Path:
    """mutated: a folder of changed headers, found before all others."""
    program = folder / "bytes_moved"
    command = [str(COMPILER), *FLAGS, *(f"-I{path}" for path in ([mutated] if mutated else []) + INCLUDES)]
    objects = []
    for name in ("bytes_moved", "count_accesses", "executor_fibers"):
        seen = ["-fsanitize=thread", "--param", "tsan-instrument-func-entry-exit=0"] if name == "bytes_moved" else []
        objects.append(str(folder / f"{name}.o"))
        subprocess.run([*command, *seen, "-c", str(EMULATION / f"{name}.cpp"), "-o", objects[-1]], check=True)
    subprocess.run([str(COMPILER), "-pthread", "-Wl,--wrap=memcpy", *objects, "-o", str(program)], check=True)
    return program


def rows_of(program: Path) -> list[Moved]:
    said = subprocess.run([str(program), str(NUMEL)], capture_output=True, text=True, check=True, timeout=100).stdout
    found: dict[tuple[str, str], list[list[int]]] = {}
    for line in said.splitlines():
        name, dtype, _, *counts = line.split()
        found.setdefault((name, dtype), []).append([int(count) for count in counts])
    rows = []
    for (name, dtype), counts in found.items():
        mean = [sum(of_ranks) / WORLD for of_ranks in zip(*counts, strict=True)]
        rows.append(Moved("CUDA", name, f"[{NUMEL}]", dtype, *mean, LEAST[name](NUMEL, ITEM[dtype], WORLD)))
    return rows


@functools.cache
def rows() -> list[Moved]:
    with tempfile.TemporaryDirectory() as folder:
        return rows_of(build(Path(folder)))
