"""What nvcc makes of the kernels of csrc/cuda, for three generations of GPUs: read, not run."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
CSRC = ROOT / "csrc"
ARCHITECTURES = ["90a", *(pytest.param(name, marks=pytest.mark.slow) for name in ("80", "100a"))]
NVCC, PTXAS = shutil.which("nvcc"), shutil.which("ptxas")
needs_nvcc = pytest.mark.skipif(NVCC is None or PTXAS is None, reason="no nvcc on this machine")
VECTOR_KERNELS = (
    "two_shot_all_reduce",
    "multimem_all_reduce",
    "reduce_scatter",
    "all_gather_kernel",
    "zero_scatter",
    "zero_step",
)
MULTIMEM = {
    "multimem.ld_reduce.relaxed.sys.global.add.v4.f32",
    "multimem.ld_reduce.relaxed.sys.global.add.acc::f32.v4.bf16x2",
    "multimem.ld_reduce.relaxed.sys.global.add.acc::f32.v4.f16x2",
    "multimem.st.relaxed.sys.global.v4.f32",
}
# Kernels that wait without being in a collective, or give without waiting.
ONE_SIDED = ("gate_kernel", "wait_kernel", "publish_kernel", "finish_kernel", "ring_")


ALL_KERNELS = ROOT / "tests" / "kernels" / "static" / "all_kernels.cu"
# With every signal in it, for what is compiled often.
TWO_KERNELS = """
#include "cuda/all_reduce.cuh"
#include "cuda/reduce_scatter.cuh"
namespace pypar {
template __global__ void one_shot_all_reduce<float>(const __grid_constant__ AllReduceParams);
template __global__ void reduce_scatter_kernel<float>(const __grid_constant__ ReduceScatterParams);
}
"""


def ptx_of(folder: Path, architecture: str, source: Path, first: Path | None = None) -> str:
    """first: a folder whose headers are found before the others."""
    target = folder / f"kernels_{architecture}.ptx"
    includes = [f"-I{path}" for path in ([first] if first else []) + [CSRC / "include", CSRC]]
    command = [str(NVCC), "-std=c++20", f"-arch=sm_{architecture}", *includes, "-ptx", str(source), "-o", str(target)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and "warning" not in done.stderr, done.stderr
    return target.read_text()


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """architecture -> (PTX, what ptxas says of it)"""
    folder, made = tmp_path_factory.mktemp("ptx"), {}

    def of(architecture: str) -> tuple[str, str]:
        if architecture not in made:
            ptx = ptx_of(folder, architecture, ALL_KERNELS)
            path = folder / f"kernels_{architecture}.ptx"
            command = [str(PTXAS), "-v", f"-arch=sm_{architecture}", str(path), "-o", f"{path}.cubin"]
            done = subprocess.run(command, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            made[architecture] = ptx, done.stderr
        return made[architecture]

    return of


def kernels_of(ptx: str) -> dict[str, str]:
    return {m[1]: m[0] for m in re.finditer(r"\.entry (\w+)\(.*?\n\}\n", ptx, re.S)}


def faults(ptx: str) -> list[str]:
    """What breaks the rules of docs/gpu_kernels.md in some kernel."""
    found = []
    for name, body in kernels_of(ptx).items():
        if any(part in name for part in ONE_SIDED):
            continue
        for needed in ("st.release.sys.global.u32", "ld.relaxed.sys.global.u32", "fence.acq_rel.sys", "trap;"):
            if needed not in body:
                found.append(f"{name} has no {needed}")
        if any(part in name for part in VECTOR_KERNELS):
            found += [f"{name} has no {kind} of 16 bytes" for kind in ("ld", "st") if not vectors(body, kind)]
        elif "st.relaxed.sys.global.u64" not in body or "ld.relaxed.sys.global.u64" not in body:
            found.append(f"{name} has no pairs of 8 bytes")
    allowed = {"atom.acq_rel.gpu.global.add.u32", "atom.relaxed.gpu.global.cas.b32"}
    found += sorted(set(re.findall(r"\b(?:atom|red|multimem)\.[\w.:]+", ptx)) - allowed - MULTIMEM)
    # A peer is on another GPU; a load that another GPU writes must not be cached as constant; volatile orders nothing.
    found += sorted(
        set(re.findall(r"\b(?:st|ld|fence)\.\w+\.(?:gpu|cta)[\w.]*|\bld\.global\.nc\S*|\S*volatile\S*", ptx))
    )
    return found


def vectors(body: str, kind: str) -> int:
    return len(re.findall(rf"\b{kind}\.(?:global\.)?(?:wb\.)?v4\.[ufb]32", body))


@needs_nvcc
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_order_scope_and_width(compiled, architecture):
    ptx, _ = compiled(architecture)
    names = " ".join(kernels_of(ptx))
    for kernel in (*VECTOR_KERNELS, "one_shot_all_reduce", *ONE_SIDED):
        assert kernel in names
    assert faults(ptx) == []


@needs_nvcc
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_no_spills_and_room_for_a_block_of_256_threads(compiled, architecture):
    ptx, said = compiled(architecture)
    frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", said)
    assert len(frames) == len(kernels_of(ptx)) and set(frames) == {("0", "0", "0")}
    registers = [int(n) for n in re.findall(r"Used (\d+) registers", said)]
    assert len(registers) == len(frames)
    assert max(registers) <= 128  # two blocks a multiprocessor, which is more than a cooperative launch of 64 needs


@needs_nvcc
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_switch_adds_in_one_kernel_and_from_hopper_on(compiled, architecture):
    found = {
        name: set(re.findall(r"\bmultimem\.[\w.:]+", body))
        for name, body in kernels_of(compiled(architecture)[0]).items()
    }
    if architecture == "80":
        assert not any(found.values())
        return
    ours = {name: ops for name, ops in found.items() if "multimem_all_reduce" in name}
    assert len(ours) == 3 and all(not ops for name, ops in found.items() if name not in ours)
    assert all(len(ops) == 2 and "multimem.st.relaxed.sys.global.v4.f32" in ops for ops in ours.values())
    assert set().union(*ours.values()) == MULTIMEM


@needs_nvcc
def test_the_optimizer_is_not_contracted(compiled):
    """Products and sums apart, roots and quotients rounded: the bits of csrc/cpu/adamw.cpp."""
    bodies = [body for name, body in kernels_of(compiled("90a")[0]).items() if "zero_step" in name]
    assert len(bodies) == 3
    for body in bodies:
        assert "fma." not in body and "approx" not in body
        assert "sqrt.rn.f32" in body and "div.rn.f32" in body


@needs_nvcc
@pytest.mark.slow
@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("st.release.sys.global.u32", "st.release.gpu.global.u32", "st.release.gpu"),
        ("st.release.sys.global.u32", "st.relaxed.sys.global.u32", "no st.release.sys"),
        ("st.release.sys.global.u32", "st.volatile.global.u32", "volatile"),
        ('asm volatile("fence.acq_rel.sys;" ::: "memory");\n}\n\n// Counts', "}\n\n// Counts", "no fence.acq_rel.sys"),
        ("ld.relaxed.sys.global.u32", "ld.volatile.global.u32", "volatile"),
        ("ld.relaxed.sys.global.u32", "ld.relaxed.gpu.global.u32", "ld.relaxed.gpu"),
        ("st.relaxed.sys.global.u64", "st.global.u64", "no pairs of 8 bytes"),
        ('  asm volatile("trap;");\n', "", "no trap"),
    ],
)
def test_a_mistake_in_a_signal_is_found(tmp_path, old, new, said):
    text = (CSRC / "include" / "pypar" / "signal.cuh").read_text()
    assert text.count(old) == 1
    text = text.replace(old, new)
    if "no fence" in said:  # the one before a trap is another
        text = text.replace('fence_sys() {\n  asm volatile("fence.acq_rel.sys;" ::: "memory");', "fence_sys() {")
    (tmp_path / "pypar").mkdir()
    (tmp_path / "pypar" / "signal.cuh").write_text(text)
    source = tmp_path / "two_kernels.cu"
    source.write_text(TWO_KERNELS)
    assert said in " ".join(faults(ptx_of(tmp_path, "90a", source, tmp_path)))


@needs_nvcc
def test_the_launcher_compiles(tmp_path):
    source = tmp_path / "launch.cu"
    source.write_text(
        '#include "cuda/all_reduce.cuh"\n#include "pypar/launch.cuh"\n'
        "void f(const pypar::AllReduceParams& p, cudaStream_t s) {\n"
        "  pypar::launch(pypar::two_shot_all_reduce<float>, dim3(4), dim3(256), 0, s, p, true);\n"
        "  pypar::copy_async(p.out, p.x, 4, s);\n}\n"
    )
    command = [str(NVCC), "-std=c++20", "-arch=sm_90a", f"-I{CSRC / 'include'}", f"-I{CSRC}", "-c", str(source)]
    done = subprocess.run([*command, "-o", str(tmp_path / "launch.o")], capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == ""


def test_ptx_and_launches_are_in_one_place_each():
    for path in sorted(CSRC.rglob("*.cu*")):
        code = re.sub(r"//.*", "", path.read_text())
        assert "<<<" not in code, path
        assert "asm" not in code or path.name == "signal.cuh", path
        assert "cudaLaunch" not in code or path.name == "launch.cuh", path
