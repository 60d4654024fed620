"""The import rules and the name chain of the design: one stem through every folder."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
OPS = sorted(p.stem for p in (ROOT / "pypar" / "reference").glob("*.py") if p.stem not in ("__init__", "collectives"))

# What the modules of a layer may import of pypar; a layer is a prefix of the module's name, the longest one counts.
MAY_IMPORT = {
    "pypar.reference": {"pypar.reference", "pypar.mesh"},
    "pypar.mesh": {"pypar.backend"},
    "pypar.backend": {"pypar._C", "pypar._build", "pypar.errors"},
    "pypar.symmetric": {"pypar.backend", "pypar.mesh"},
    "pypar.channel": {"pypar.errors"},
    "pypar.triton_kernels": set(),  # pointers and sizes, never a group
    "pypar.ops": {
        "pypar.channel",
        "pypar.reference",
        "pypar.triton_kernels",
        "pypar.symmetric",
        "pypar.mesh",
        "pypar.ops",
        "pypar.backend",
    },
    "pypar.gradients": {"pypar.ops", "pypar.symmetric", "pypar.mesh", "pypar.backend"},
    "pypar.data_parallel": {"pypar.ops", "pypar.symmetric", "pypar.mesh", "pypar.backend", "pypar.gradients"},
    "pypar.zero": {"pypar.ops", "pypar.symmetric", "pypar.mesh", "pypar.backend", "pypar.gradients"},
    "pypar.pieces": set(),
    "pypar.placement": {"pypar.pieces"},
    # One device per rank is a pipeline with one micro-batch, which model parallel is written with.
    "pypar.model_parallel": {"pypar.placement", "pypar.pipeline_parallel"},
    "pypar.pipeline_parallel": {
        "pypar.reference",
        "pypar.ops",
        "pypar.symmetric",
        "pypar.mesh",
        "pypar.backend",
        "pypar.pieces",
        "pypar.placement",
        "pypar.gradients",
    },
    "pypar.hybrid": {
        "pypar.data_parallel",
        "pypar.model_parallel",
        "pypar.pipeline_parallel",
        "pypar.tensor_parallel",
        "pypar.zero",
        "pypar.gradients",
        "pypar.placement",
        "pypar.ops",
        "pypar.symmetric",
        "pypar.mesh",
        "pypar.reference",
        "pypar.backend",
        "pypar.atomic",
        "pypar.rng",
    },
    "pypar.tensor_parallel": {"pypar.ops", "pypar.symmetric", "pypar.mesh", "pypar.backend", "pypar.tensor_parallel"},
}
METHOD_ROOMS = ["data_parallel", "model_parallel", "pipeline_parallel", "tensor_parallel", "zero"]
COMPOSES = {"model_parallel": "pipeline_parallel"}  # the one exception; see MAY_IMPORT


def imports_of(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            base = node.module
            names |= {f"{base}.{alias.name}" for alias in node.names} if base == "pypar" else {base}
    return names


def modules() -> list[tuple[str, Path]]:
    paths = sorted(
        p for p in (ROOT / "pypar").rglob("*.py") if "triton_kernels" not in p.parts
    )  # a link, followed or not
    paths += [ROOT / "pypar" / p.relative_to(ROOT) for p in sorted((ROOT / "triton_kernels").glob("*.py"))]
    return [(".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"), p) for p in paths]


def test_layers_import_only_what_lies_below():
    wrong = []
    for module, path in modules():
        layer = max((k for k in MAY_IMPORT if module == k or module.startswith(k + ".")), key=len, default=None)
        if layer is None:
            continue
        for name in imports_of(path):
            if name.startswith("pypar.") and not any(
                name == a or name.startswith(a + ".") for a in MAY_IMPORT[layer] | {layer}
            ):
                wrong.append(f"{module} imports {name}; {layer} may import {sorted(MAY_IMPORT[layer])}")
    assert not wrong, "\n".join(wrong)


def test_method_rooms_do_not_import_each_other():
    wrong = []
    for module, path in modules():
        room = next((r for r in METHOD_ROOMS if module.startswith(f"pypar.{r}")), None)
        if room is not None:
            others = [f"pypar.{r}" for r in METHOD_ROOMS if r not in (room, COMPOSES.get(room))]
            wrong += [f"{module} imports {n}" for n in imports_of(path) if any(n.startswith(o) for o in others)]
    assert not wrong, "\n".join(wrong)


def test_the_package_imports_neither_tests_nor_bench():
    wrong = [
        f"{module} imports {name}"
        for module, path in modules()
        for name in imports_of(path)
        if name.split(".")[0] in ("tests", "bench")
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("op", OPS)
def test_one_stem_through_every_folder(op):
    wanted = [
        f"csrc/cpu/{op}.cpp",
        f"pypar/ops/{op}.py",
        f"tests/ops/test_{op}.py",
        f"bench/bench_{op}.py",
    ]
    assert not [w for w in wanted if not (ROOT / w).is_file()]
    assert f'"{op}' in (ROOT / f"csrc/cpu/{op}.cpp").read_text(), "the C++ file registers the op under its stem"
    import torch

    import pypar  # noqa: F401

    assert hasattr(torch.ops.pypar, op)


CUDA_OPS = [
    "all_gather",
    "all_reduce",
    "reduce_scatter",
    "ring_recv",
    "ring_send",
    "zero_gather",
    "zero_scatter",
    "zero_step",
]
TRITON_OPS = ["all_gather_matmul", "all_reduce", "matmul_all_reduce", "matmul_reduce_scatter", "vocab_cross_entropy"]


@pytest.mark.parametrize("op", CUDA_OPS)
def test_one_stem_in_cuda(op):
    assert f'"{op}' in (ROOT / f"csrc/cuda/{op}.cu").read_text(), "the file registers the op under its stem"
    assert op in OPS


@pytest.mark.parametrize("op", TRITON_OPS)
def test_one_stem_in_triton(op):
    assert f"def {op}" in (ROOT / f"triton_kernels/{op}.py").read_text(), "the file has the launcher of its stem"
    assert op in OPS


def test_ptx_is_in_one_header():
    sources = [p for p in (ROOT / "csrc").rglob("*.cu*") if p.name != "signal.cuh"]
    assert len(sources) > 10
    assert not [p.name for p in sources if "asm" in p.read_text() and "asm volatile" in p.read_text()]


def test_files_stay_small():
    kinds = [("pypar", "*.py"), ("triton_kernels", "*.py"), *(("csrc", f"*.{e}") for e in ("cpp", "h", "cu", "cuh"))]
    sources = [p for d, e in kinds for p in (ROOT / d).rglob(e)]
    lines = {str(p.relative_to(ROOT)): p.read_text().splitlines() for p in sources}
    long = {name: len(text) for name, text in lines.items() if len(text) > 400 and "// Long, because" not in text[0]}
    assert not long, f"over 400 lines: split, or begin with '// Long, because ...': {long}"
