"""`pypar doctor`: what is here, and which kernel each op will run."""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import os
import platform
import sys
from collections.abc import Iterator

import torch

from pypar import backend
from pypar.ops import Calibration, explain

OPS = ["all_reduce", "reduce_scatter", "all_gather", "all_to_all", "broadcast"]
# Op -> the shapes that one of two ranks passes, for an example.
FUSED = {
    "all_gather_matmul": [(1024, 4096), (2048, 4096)],
    "matmul_reduce_scatter": [(2048, 2048), (4096, 2048)],
    "matmul_all_reduce": [(2048, 2048), (4096, 2048)],
}
ASSUMED = Calibration(1e-4, 1.25e8, 1e-3, 0.0, 1e11, 5e10, 1e11, 1e10)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "absent"


def _huge_pages() -> str:
    try:
        with open("/sys/kernel/mm/transparent_hugepage/shmem_enabled") as f:
            return f.read().split("[")[1].split("]")[0]
    except (OSError, IndexError):
        return "unknown"


def _extension() -> str:
    info = backend.build_info()
    if not info:
        return "absent"
    return f"commit {info['commit']}, built against torch {info['torch']} with GCC {info['compiler']}"


def _kernel(op: str) -> str:
    """Which kernel a call on CPU tensors runs."""
    if backend.extension is None:
        return "plain-torch reference over torch.distributed"
    if not torch._C._dispatch_has_kernel_for_dispatch_key(f"pypar::{op}", "CPU"):
        return "none: the extension lacks it; reinstall pypar"
    return f"C++ on shared memory, {backend.extension.cpu_capability()}"


def _forms(op: str) -> str:
    """Which form a fused matmul takes on one host and between hosts."""
    if backend.extension is None:
        return _kernel(op)
    example = explain(op, FUSED[op], hosts=[1, 1], calibration=ASSUMED)
    shapes = " x ".join(str(list(shape)) for shape in FUSED[op])
    return (
        f"one host: {_kernel(op)}, rows multiplied where they lie; between hosts: whole or chunked over gloo, as "
        f"pypar.explain says ({shapes} float32, 2 hosts, assuming 1 Gbit/s and 100 GFLOP/s: {example.form}, "
        f"{example.num_chunks} chunks)"
    )


NOT_RUN = "compiled and executed under emulation; not yet run on a GPU"


def _cuda_part() -> str:
    """Whether the CUDA kernels are in the extension, and why they aren't used."""
    targets = backend.build_constant("CUDA")
    if backend.extension is None:
        return "absent: there is no compiled extension"
    if not targets or targets == "unknown":
        why = (
            "torch was built without CUDA" if torch.version.cuda is None else "nvcc was not found, or PYPAR_CUDA was 0"
        )
        return f"absent: when pypar was built, {why}; kernels in csrc/cuda ({NOT_RUN})"
    unused = "" if torch.cuda.is_available() else "; unused: no GPU is visible"
    return f"built for sm_{targets.replace(' ', ', sm_')}{unused} ({NOT_RUN})"


def _triton_part() -> str:
    """Whether the Triton kernels can be imported, and why they aren't used."""
    if importlib.util.find_spec("triton") is None:
        return "absent: triton is not installed"
    if torch.cuda.is_available():
        return f"for CUDA tensors ({NOT_RUN})"
    return f"there, unused: no GPU is visible, CPU tensors run the C++ kernels ({NOT_RUN})"


def _multicast() -> str:
    """Whether the NVLink switch can add, as torch's symmetric memory sees it: each rank then agrees with its peers."""
    if not torch.cuda.is_available():
        return "unused: no GPU is visible"
    has = torch._C._distributed_c10d._SymmetricMemory.has_multicast_support
    lack = [i for i in range(torch.cuda.device_count()) if not has(torch._C._autograd.DeviceType.CUDA, i)]
    if lack:
        return f"absent on GPU {', '.join(map(str, lack))}: all_reduce adds on the GPUs"
    return f"there: all_reduce takes it where Limits(multimem=True) asks for it ({NOT_RUN})"


def report() -> Iterator[tuple[str, str]]:
    """(name, value) rows; also what the benches write beside their numbers."""
    from pypar import __version__

    yield "pypar", __version__
    yield "python", platform.python_version()
    yield "torch", torch.__version__
    for package in ("triton", "transformers"):
        yield package, _version(package)
    yield "machine", f"{platform.machine()}, {os.cpu_count()} cores, {len(os.sched_getaffinity(0))} usable here"
    yield "torch CPU capability", torch.backends.cpu.get_cpu_capability()
    yield "torch threads", str(torch.get_num_threads())
    yield "CUDA", torch.version.cuda or "torch was built without it"
    yield "compiled extension", _extension()
    yield "CUDA kernels", _cuda_part()
    yield "Triton kernels", _triton_part()
    yield "NVLink multicast", _multicast()
    yield "huge pages for shared memory", _huge_pages()
    if backend.extension is not None:
        yield "transport", "ranks of one host: shared memory (memfd); between hosts: gloo"
        yield "large copies", backend.extension.copy_method()
    else:
        yield "transport", "gloo"
    for op in OPS:
        yield f"torch.ops.pypar.{op}", _kernel(op)
    for op in FUSED:
        yield f"torch.ops.pypar.{op}", _forms(op)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="pypar doctor",
        description="Prints versions, processor features, transport, and which kernel each op will run.",
    )
    parser.parse_args(argv)
    rows = list(report())
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"{name:<{width}}  {value}")
    if not backend.available():
        print("pypar: the compiled extension is absent; the plain-torch references serve", file=sys.stderr)
    return 0
