"""What the fused matmuls compile to for sm_80, sm_90 and sm_100: no GPU needed, and none was used.

The launchers themselves run, in a process of their own, on CPU tensors; every kernel that they would launch is compiled
with the specialization that Triton would choose. `facts()` returns a row for each.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TARGETS = (80, 90, 100)
DTYPES = {
    80: ("bfloat16", "float32"),
    90: ("bfloat16", "float16", "float32", "float8_e4m3fn"),
    100: ("bfloat16", "float32", "float8_e4m3fn"),
}
TENSOR_CORES = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}
MATMULS = ("gathered_matmul", "matmul_to_owners", "matmul_to_all")
PUBLISH = ("push_shard", "tell_pushed", "matmul_to_owners", "matmul_to_all", "reduce_to_all")
WAIT = ("open_call", "gathered_matmul", "reduce_own_rows", "reduce_to_all", "copy_result")

pytestmark = pytest.mark.slow


@functools.cache
def facts(what: str = "kernels") -> list[dict]:
    """A row for each kernel, dtype and target: registers, stack (spills), shared memory, instructions."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")])
    environment["TRITON_DEFAULT_FP_FUSION"] = "1"
    done = subprocess.run(
        [sys.executable, __file__, what], env=environment, cwd=ROOT, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


class CompileOnly:
    """While it is active, launching a kernel compiles it for `target` and notes it."""

    def __init__(self, target: int) -> None:
        from triton.backends.compiler import GPUTarget

        self.target, self.kernels = GPUTarget("cuda", target, 32), {}

    def get_current_target(self):  # type: ignore[no-untyped-def]
        return self.target

    def get_current_device(self) -> int:
        return self.target.arch

    def get_current_stream(self, device: int) -> int:
        return 0

    def __enter__(self) -> dict:
        from triton.runtime import driver
        from triton.runtime.jit import JITFunction

        driver.set_active(self)
        self.run = run = JITFunction.run

        def compile_only(function, *args, grid, warmup, **kwargs):  # type: ignore[no-untyped-def]
            self.kernels[function.fn.__name__] = run(function, *args, grid=grid, warmup=True, **kwargs)

        JITFunction.run = compile_only
        return self.kernels

    def __exit__(self, *raised) -> None:  # type: ignore[no-untyped-def]
        from triton.runtime.jit import JITFunction

        JITFunction.run = self.run


def compile_kernels() -> list[dict]:
    import torch

    from pypar.triton_kernels.matmul_tile import config_for

    rows = []
    for target in TARGETS:
        for name in DTYPES[target]:
            dtype = getattr(torch, name)
            with CompileOnly(target) as kernels:
                launch_all(dtype, dataclasses.replace(config_for(dtype, target), programs=132))
            rows += [row_of(kernel, name, target, compiled) for kernel, compiled in kernels.items()]
    return rows


def compile_mistakes() -> list[dict]:
    """Rows of matmul_reduce_scatter's kernels for sm_90, first as they are, then with each of MISTAKES."""
    import torch
    from triton.runtime.jit import JITFunction

    from pypar.triton_kernels import matmul_parts, matmul_reduce_scatter, signal
    from pypar.triton_kernels.matmul_tile import Config

    rows = []
    for mistake, (name, right, wrong) in {"none": ("publish", "", ""), **MISTAKES}.items():
        function = getattr(signal, name)
        source = function.src
        assert right in source
        function._unsafe_update_src(source.replace(right, wrong))
        for module in (signal, matmul_parts, matmul_reduce_scatter):
            for caller in vars(module).values():
                if isinstance(caller, JITFunction):
                    caller.hash = None
                    caller.device_caches.clear()
        with CompileOnly(90) as kernels:
            matmul_reduce_scatter.matmul_reduce_scatter(
                torch.empty(64, 64), torch.empty(64, 64), torch.empty(2, dtype=torch.int64), 0, 2, 1 << 20, 100,
                config=Config(block_m=32, block_n=32, block_k=32, programs=8, cols=32),
            )  # fmt: skip
        rows += [{"mistake": mistake, **row_of(k, "float32", 90, compiled)} for k, compiled in kernels.items()]
        function._unsafe_update_src(source)
    return rows


def launch_all(dtype, config) -> None:  # type: ignore[no-untyped-def]
    import torch

    from pypar.triton_kernels.all_gather_matmul import all_gather_matmul
    from pypar.triton_kernels.matmul_all_reduce import matmul_all_reduce
    from pypar.triton_kernels.matmul_reduce_scatter import matmul_reduce_scatter

    fp8 = dtype == torch.float8_e4m3fn
    M, N, K = 2048, 512, 256
    x, w = torch.empty(M, K, dtype=dtype), torch.empty(N, K, dtype=dtype)
    out = torch.bfloat16 if fp8 else dtype
    where = {"pointers": torch.empty(4, dtype=torch.int64), "rank": 2, "world_size": 4, "slot_bytes": 1 << 26}
    where |= {"polls": 1 << 24, "config": config}
    one = torch.ones(1)
    scales = {"x_scale": one, "w_scale": one} if fp8 else {}
    bias, residual = torch.empty(N, dtype=out), torch.empty(M, N, dtype=out)
    added = {"bias": bias, "activation": "gelu"}
    matmul_reduce_scatter(x, w, **where, **added, residual=residual[: M // 4], **scales)
    matmul_all_reduce(x, w, **where, **added, residual=residual, **scales)
    matmul_all_reduce(x[:128], w, **where, **added, residual=residual[:128], **scales)
    scales = {"x_scale": one, "w_scales": [one, one]} if fp8 else {}
    all_gather_matmul(x, [w, w], **where, biases=[bias, None], **scales)
    all_gather_matmul(x, [w, w], **where, biases=[bias, None], **scales, addresses=[0] * 4)  # open_call did not run


def row_of(name, dtype, target, kernel) -> dict:  # type: ignore[no-untyped-def]
    tools = Path(sys.modules["triton"].__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(kernel.asm["cubin"])
        cubin.flush()
        command = [str(tools / "cuobjdump"), "-res-usage", cubin.name]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    ptx = kernel.asm["ptx"]
    stores = re.findall(r"st\.global\.(?:v(\d)\.)?b(\d+)", ptx)
    loads = re.findall(r"ld\.global\.(?:\w+::\w+\.)*(?:v(\d)\.)?b(\d+)", ptx)
    copies = [int(n, 16) for n in re.findall(r"cp\.async\.c[ag]\.shared\.global [^,]*, [^,]*, (0x\w+)", ptx)]
    return {
        "kernel": name,
        "dtype": dtype,
        "target": target,
        "registers": int(re.search(r"REG:(\d+)", said).group(1)),
        "stack_bytes": sum(int(n) for n in re.findall(r"(?:STACK|LOCAL):(\d+)", said)),
        "shared_bytes": kernel.metadata.shared,
        "num_warps": kernel.metadata.num_warps,
        "tensor_cores": [i for i in TENSOR_CORES.values() if i in ptx],
        "tma_loads": ptx.count("cp.async.bulk.tensor.2d.shared"),
        "tma_stores": len(re.findall(r"cp\.async\.bulk\.tensor\.\dd\.global\.shared", ptx)),
        "release_sys": len(re.findall(r"\.sys\.release|\.release\.sys", ptx)),
        "acquire_sys": len(re.findall(r"\.sys\.acquire|\.acquire\.sys", ptx)),
        "acq_rel_gpu": len(re.findall(r"\.gpu\.acq_rel|\.acq_rel\.gpu", ptx)),
        "float_atomics": len(re.findall(r"\b(?:red|atom|multimem)[.\w:]*\.(?:f16|f32|f64|bf16)\w*", ptx)),
        "widest_store_bytes": max((int(v or 1) * int(b) // 8 for v, b in stores), default=0),
        "widest_load_bytes": max([int(v or 1) * int(b) // 8 for v, b in loads] + copies, default=0),
        "volatile": ptx.count(".volatile.global") + ptx.count("ld.volatile"),
    }


def of(*kernels: str) -> list[dict]:
    found = [row for row in facts() if not kernels or row["kernel"] in kernels]
    assert {row["kernel"] for row in found} >= set(kernels)
    return found


def described(row: dict) -> str:
    return f"{row['kernel']}, {row['dtype']}, sm_{row['target']}: {row}"


def test_every_kernel_compiles_for_every_target():
    kernels = set(MATMULS) | set(PUBLISH) | set(WAIT)
    assert {(r["kernel"], r["target"]) for r in of()} == {(k, t) for k in kernels for t in TARGETS}


def test_halves_and_float8_run_on_tensor_cores():
    for row in of(*MATMULS):
        wanted = [] if row["dtype"] == "float32" else [TENSOR_CORES[row["target"]]]  # float32 is exact
        assert row["tensor_cores"] == wanted, described(row)


def test_descriptors_are_used_from_sm_90_on_and_never_to_store():
    for row in of(*MATMULS):
        expected = row["target"] >= 90 and row["dtype"] != "float32"
        assert (row["tma_loads"] > 0) == expected and not row["tma_stores"], described(row)


def test_signals_release_and_acquire_at_system_scope():
    for row in of(*PUBLISH):
        assert row["release_sys"] and (row["acq_rel_gpu"] or row["kernel"] == "tell_pushed"), described(row)
    for row in of(*WAIT):
        assert row["acquire_sys"], described(row)
    assert not any(row["volatile"] for row in of())


def test_no_atomic_adds_floats():
    assert not any(row["float_atomics"] for row in of())


def test_nothing_spills_and_blocks_fit():
    shared = {80: 163, 90: 227, 100: 227}  # KiB a block may have
    for row in of():
        assert row["stack_bytes"] == 0, described(row)
        assert row["shared_bytes"] <= shared[row["target"]] * 1024, described(row)
        assert row["registers"] * 32 * row["num_warps"] <= 65536, described(row)


def test_accesses_are_16_bytes_wide():
    for row in of():
        if row["kernel"] not in ("open_call", "tell_pushed"):
            assert row["widest_store_bytes"] == 16, described(row)
            assert row["widest_load_bytes"] == 16 or row["tma_loads"], described(row)


# As in signal.py: the function, what it says, what a mistake would make of it.
MISTAKES = {
    "a signal of GPU scope": ("publish", 'sem="release", scope="sys"', 'sem="release", scope="gpu"'),
    "a signal without release": ("publish", 'sem="release"', 'sem="relaxed"'),
    "a wait without acquire": ("wait", 'sem="acquire"', 'sem="relaxed"'),
    "a wait of GPU scope": ("wait", 'sem="acquire", scope="sys"', 'sem="acquire", scope="gpu"'),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_memory_order_is_seen(mistake):
    """By what test_signals_release_and_acquire_at_system_scope looks at."""
    kernel, column = ("matmul_to_owners", "release_sys") if "signal" in mistake else ("reduce_own_rows", "acquire_sys")
    count = {row["mistake"]: row[column] for row in facts("mistakes") if row["kernel"] == kernel}
    assert count[mistake] < count["none"], count


if __name__ == "__main__":
    print(json.dumps(compile_kernels() if sys.argv[1] == "kernels" else compile_mistakes()))
