"""What the Triton all_reduce and loss compile to for sm_80, sm_90 and sm_100: no GPU needed, and none was used.

The launchers run in a process of their own, not interpreted, on CPU tensors; what they would launch is compiled.
"""

from __future__ import annotations

import functools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TARGETS = (80, 90, 100)
DTYPES = ("float32", "bfloat16")
REDUCE = {"all_reduce_in_one_shot", "all_reduce_in_two_shots"}
EXCHANGE = {*REDUCE, "push_row_stats", "merge_row_stats"}
LOCAL = {"add_rows", "gradient"}

pytestmark = pytest.mark.slow


@functools.cache
def facts() -> list[dict]:
    """A row for each kernel, dtype and target."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(ROOT), "TRITON_DEFAULT_FP_FUSION": "1"}
    done = subprocess.run(
        [sys.executable, __file__], env=environment, cwd=ROOT, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


class CompilesFor:
    """In the place of Triton's driver: a GPU of that kind, of which nothing is asked but its kind."""

    def __init__(self, target: int) -> None:
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget("cuda", target, 32)

    def get_current_target(self):  # type: ignore[no-untyped-def]
        return self.target

    def get_current_device(self) -> int:
        return self.target.arch

    def get_current_stream(self, device: int) -> int:
        return 0


def launch_all(dtype) -> None:  # type: ignore[no-untyped-def]
    import torch

    from pypar.triton_kernels import vocab_cross_entropy as loss
    from pypar.triton_kernels.all_reduce import all_reduce

    where = {"pointers": torch.empty(4, dtype=torch.int64), "rank": 2, "world_size": 4, "slot_bytes": 1 << 26}
    where["polls"] = 1 << 24
    for algorithm in ("one_shot", "two_shot"):
        all_reduce(torch.empty(1 << 20, dtype=dtype), "sum", algorithm, **where)
    logits, target = torch.empty(2048, 32000, dtype=dtype), torch.empty(2048, dtype=torch.int64)
    shard = {"begin": 64000, "vocabulary": 128000, "ignore_index": -100, "label_smoothing": 0.1}
    *_, stats = loss.vocab_cross_entropy(logits, target, **where, **shard, config=loss.Config())
    loss.vocab_cross_entropy_dlogits(logits, target, stats, torch.ones(()), **shard, config=loss.Config())


def compile_all() -> list[dict]:
    import torch
    from test_triton_matmul_static import row_of  # this file is run as a program, in its own folder
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    rows, run = [], JITFunction.run

    def compile_only(function, *args, grid, warmup, **kwargs):  # type: ignore[no-untyped-def]
        kernel = run(function, *args, grid=grid, warmup=True, **kwargs)
        rows.append({**row_of(function.fn.__name__, dtype, target, kernel), "ptx": kernel.asm["ptx"]})

    JITFunction.run = compile_only
    for target in TARGETS:
        driver.set_active(CompilesFor(target))
        for dtype in DTYPES:
            launch_all(getattr(torch, dtype))
    return rows


def count(pattern: str, row: dict) -> int:
    return len(re.findall(pattern, row["ptx"]))


def widest(pattern: str, row: dict) -> int:
    """Bytes of the widest access to global memory."""
    found = re.findall(pattern + r"\.global\.(?:\w+::\w+\.)*(?:v(\d)\.)?b(\d+)", row["ptx"])
    return max((int(vector or 1) * int(bits) // 8 for vector, bits in found), default=0)


def test_every_kernel_compiles_for_every_target():
    made = {(row["kernel"], row["dtype"], row["target"]) for row in facts()}
    assert made == {(k, d, t) for k in EXCHANGE | LOCAL for d in DTYPES for t in TARGETS}


def test_signals_release_and_acquire_at_system_scope():
    for row in facts():
        exchanges, name = row["kernel"] in EXCHANGE, (row["kernel"], row["target"])
        assert (count(r"\.release\.sys|\.sys\.release", row) > 0) == exchanges, name
        assert (count(r"\.acquire\.sys|\.sys\.acquire", row) > 0) == exchanges, name
        assert not count(r"\.volatile", row), name


def test_no_atomic_adds_floats():
    for row in facts():
        assert not count(r"\b(?:red|atom|multimem)\.[.\w:]*\.(?:f16|f32|f64|bf16)", row), (row["kernel"], row["target"])


def test_vectors_and_logits_move_by_16_bytes():
    for row in facts():
        name = row["kernel"], row["dtype"], row["target"]
        if row["kernel"] in {*REDUCE, "gradient"}:
            assert widest("ld", row) == 16 and widest("st", row) == 16, name
        if row["kernel"] == "push_row_stats":
            assert widest("ld", row) == 16, name


def test_at_most_one_value_spills():
    """8 bytes, one address or counter, in 3 of 36 compilations: two_shots in float32 for sm_80 and sm_100,
    push_row_stats in bfloat16 for sm_100. There ptxas keeps to 40, 32 and 64 registers, for more resident blocks; in
    its SASS that value is stored once and loaded at most three times, outside of every loop: no cost for an element.
    """
    for row in facts():
        name = row["kernel"], row["dtype"], row["target"], row["stack_bytes"], row["registers"]
        assert row["stack_bytes"] <= (8 if row["kernel"] in ("all_reduce_in_two_shots", "push_row_stats") else 0), name
        assert row["registers"] <= 64, name


if __name__ == "__main__":
    print(json.dumps(compile_all()))
