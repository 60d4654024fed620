"""Compiles csrc/cuda for the CPU, against tests/kernels/emulation, so that its kernels run without a GPU."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent.parent
EMULATION = ROOT / "tests" / "kernels" / "emulation"
BUILD = ROOT / "build" / "emulation"
# As in cuda_runtime.h there: no contraction of products and sums. -O1 compiles in a third of the time of -O2.
FLAGS = ["-std=c++20", "-O1", "-g0", "-ffp-contract=off", "-Wall", "-Werror", "-Wno-unknown-pragmas", "-Wno-attributes"]
INCLUDES = [EMULATION, ROOT / "csrc" / "include", ROOT / "csrc"]
COMPILER = shutil.which("g++")


@functools.cache
def load() -> None:
    """Defines torch.ops.pypar_cuda for CPU tensors. Compiles what has changed since the last time, and nothing else."""
    from torch.utils.cpp_extension import load as load_extension

    BUILD.mkdir(parents=True, exist_ok=True)
    # One source of all: torch's headers take most of the time. And ninja would give a .cu to nvcc.
    launchers = BUILD / "launchers.cpp"
    text = "".join(f'#include "cuda/{path.name}"\n' for path in sorted((ROOT / "csrc" / "cuda").glob("*.cu")))
    text += '#include "multicast_op.h"\n'
    if not launchers.exists() or launchers.read_text() != text:
        launchers.write_text(text)
    sources = [str(EMULATION / "executor_fibers.cpp"), str(launchers)]
    library = BUILD / "pypar_cuda_emulated.so"
    load_extension(
        library.stem,
        sources,
        extra_cflags=FLAGS,
        extra_include_paths=[str(path) for path in INCLUDES],
        build_directory=str(BUILD),
        is_python_module=False,
    )


def channel(group: torch.distributed.ProcessGroup, name: str, slot_bytes: int):
    """A channel of CPU memory, and the arguments that the launchers take of it."""
    from pypar.channel import channel_of

    made = channel_of(group, name, slot_bytes, "cpu")
    return made, (made.pointers, made.rank, made.slot_bytes)


def multicast(made) -> int:
    """An emulated multicast address of the channel's memory."""
    return torch.ops.pypar_cuda_emulated.multicast(made.pointers, made.memory.numel())


SANITIZERS = {"plain": [], "races": ["-fsanitize=thread"], "memory": ["-fsanitize=address,undefined"]}


def build_ranks(folder: Path, sanitizer: str, mutated: Path | None = None) -> Path:
    """The program ranks_as_threads. mutated: a folder of changed headers, found before all others."""
    executor = "executor_fibers" if sanitizer == "plain" else "executor_threads"  # sanitizers understand threads only
    program = folder / f"ranks_{sanitizer}"
    command = [str(COMPILER), *FLAGS, "-g1", "-pthread", *SANITIZERS[sanitizer]]
    command += [f"-I{path}" for path in ([mutated] if mutated else []) + INCLUDES]
    command += [str(EMULATION / f"{name}.cpp") for name in ("ranks_as_threads", executor)]
    done = subprocess.run([*command, "-o", str(program)], capture_output=True, text=True)
    if "cannot find -l" in done.stderr:
        pytest.skip(f"this compiler has no runtime for {SANITIZERS[sanitizer]}")
    assert done.returncode == 0, done.stderr
    return program


def run_program(program: Path, scenario: str, world: int, calls: int, stalls: str = "") -> tuple[int, str]:
    environment = {**os.environ, "PYPAR_EMULATION_STALLS": stalls, "UBSAN_OPTIONS": "halt_on_error=1"}
    command = [str(program), scenario, str(world), str(calls)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, env=environment)
    return done.returncode, done.stdout + done.stderr
