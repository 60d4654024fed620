"""The peers in `make gpu`: what is installed is verified and timed; what isn't, or fails, is in the report in words."""

from __future__ import annotations

import csv
import sys
import types

import pytest
import torch
import torch.distributed as dist

from bench.gpu.__main__ import main
from pypar.testing import run_ranks

ABSENT = {"Flux": "not installed", "TransformerEngine": "not installed"}
NOT_CLOSE = "Tensor-likes are not close!"
FUSED = ("all_gather_matmul", "matmul_reduce_scatter")


def gathered(x, w):
    full = x.new_empty(len(x) * dist.get_world_size(), x.shape[1])
    dist.all_gather_into_tensor(full, x)
    return full @ w.t()


def scattered(x, w):
    part = x.new_empty(len(x) // dist.get_world_size(), len(w))
    dist.reduce_scatter_tensor(part, x @ w.t())
    return part


class AGKernel:
    def __init__(self, tp_group, nnodes, full_m, n_dim, k_dim, input_dtype, output_dtype=None):
        self.shape = (full_m // tp_group.size() // nnodes, n_dim, k_dim)

    def forward(self, input, weight, bias=None, output=None, transpose_weight=False):
        assert (len(input), *weight.shape) == self.shape
        return gathered(input, weight)


class GemmRS:
    def __init__(self, tp_group, nnodes, max_m, n_dim, input_dtype, output_dtype=None, transpose_weight=False):
        self.max_m, self.n_dim = max_m, n_dim

    def forward(self, input, weight, bias=None):
        assert len(input) <= self.max_m and self.max_m % 1024 == 0 and len(weight) == self.n_dim
        return scattered(input, weight)


class Linear(torch.nn.Module):
    """Uses the one buffer that initialize_ub made, and must have the shape that it was made for."""

    buffer = None

    def __init__(self, in_features, out_features, bias=True, tp_size=1, parallel_mode=None, params_dtype=None,
                 device=None, tp_group=None, sequence_parallel=False, ub_overlap_ag=False, ub_overlap_rs=False,
                 ub_name=None):  # fmt: skip
        super().__init__()
        self.column = parallel_mode == "column"
        assert not bias and sequence_parallel and ub_name and (ub_overlap_ag if self.column else ub_overlap_rs)
        shape = [out_features, in_features]
        shape[0 if self.column else 1] //= tp_size
        self.weight = torch.nn.Parameter(torch.empty(shape, dtype=params_dtype, device=device))

    def forward(self, x):
        y = gathered(x, self.weight) if self.column else x @ self.weight.t()
        assert Linear.buffer == [len(y), x.shape[1] if self.column else y.shape[1]]
        return y if self.column else scattered(x, self.weight)


def initialize_ub(shape, tp_size, use_fp8=False, dtype=torch.bfloat16, ub_cfgs=None, bootstrap_backend=None):
    assert Linear.buffer is None, "UB communicators are already initialized."
    Linear.buffer = shape


def destroy_ub():
    Linear.buffer = None


def module(name, **members):
    made = types.ModuleType(name)
    vars(made).update(members)
    sys.modules[name] = made


def installed(engine_lacks=None):
    """Puts both where they would be imported from. Their functions can be replaced by ones that fail."""
    module("flux", AGKernel=AGKernel, GemmRS=GemmRS, init_flux_shm=lambda group: None)
    base = types.SimpleNamespace(initialize_ub=engine_lacks or initialize_ub, destroy_ub=destroy_ub)
    module("transformer_engine")
    module("transformer_engine.pytorch", Linear=Linear, module=types.SimpleNamespace(base=base))
    module("transformer_engine_torch", device_supports_multicast=lambda: True)


def async_tp():
    """torch's own definition of what its fused ops compute, for CPU tensors."""
    from torch.distributed import _symmetric_memory as symm_mem

    library = torch.library.Library("symm_mem", "IMPL")
    library.impl("fused_all_gather_matmul", symm_mem._fused_all_gather_matmul_fallback, "CPU")
    library.impl("fused_matmul_reduce_scatter", symm_mem._fused_matmul_reduce_scatter_fallback, "CPU")
    return library


def times():
    """{(op, variant): time or reason} of the fused matmuls, of which every rank must say the same."""
    from kernels.executors import EXECUTORS

    from bench.gpu.limits import measure
    from bench.gpu.measure import _timed
    from bench.gpu.programs import programs

    reached, said = measure("cpu", True), {}
    for program in programs(EXECUTORS["reference"].find, FUSED, "cpu", True):
        for row in _timed(program, reached, "cpu", 1):
            said[row["op"], row["variant"]] = row.get("refused") or row["us"] > 0
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, said)
    assert all(other == said for other in everyone), everyone
    return said


def expected(**peers):
    default = {"pypar": True, "torch": True, "torch async-TP": "torch has none for cpu", **ABSENT}
    return {(op, variant): why for op in FUSED for variant, why in (default | peers).items()}


def check_without(rank, world):
    assert times() == expected()


def check_installed(rank, world):
    installed()
    library = async_tp()
    assert times() == expected(**{"torch async-TP": True, "TransformerEngine": True, "Flux": True})
    assert Linear.buffer is None
    del library


def check_failures(rank, world):
    def refused(*_, **__):
        raise AssertionError  # without a word

    installed(refused)
    forward = AGKernel.forward

    def on_one_rank(self, input, weight, **options):
        if rank == 1:
            raise RuntimeError("no such kernel\nand much more")
        return input @ weight.t()

    AGKernel.forward, GemmRS.forward = on_one_rank, lambda self, input, weight: scattered(input, weight) + rank
    want = expected(TransformerEngine="AssertionError", Flux="no such kernel")
    assert times() == want | {("matmul_reduce_scatter", "Flux"): NOT_CLOSE}
    AGKernel.forward = forward
    module("flux", Flux=object())  # another package of that name
    why = "module 'flux' has no attribute '{}'"
    want = expected(TransformerEngine="AssertionError", Flux=why.format("AGKernel"))
    assert times() == want | {("matmul_reduce_scatter", "Flux"): why.format("GemmRS")}


def check_all(rank, world):
    check_without(rank, world)
    check_installed(rank, world)
    check_failures(rank, world)


def test_peers_are_timed_or_said_to_lack():
    run_ranks(check_all, 2)


DIES = """
import os
class AGKernel:
    def __init__(self, *args, **kwargs):
        raise RuntimeError("needs a GPU")
class GemmRS:
    def __init__(self, *args, **kwargs):
        os._exit(3)
def init_flux_shm(group):
    pass
"""


@pytest.mark.slow
def test_a_peer_that_ends_its_rank_leaves_a_report(tmp_path, monkeypatch):
    (tmp_path / "flux.py").write_text(DIES)
    monkeypatch.syspath_prepend(str(tmp_path))
    out = tmp_path / "out"
    run = ["--executor", "reference", "--small", "--rounds", "1", "--ranks", "2", "--select", "no_such_test"]
    assert main([*run, "--out", str(out)]) == 1
    text = (out / "report.md").read_text()
    assert "died with exit code 3" in text and "Flux: needs a GPU" in text
    assert "matmul_reduce_scatter" not in text.split("The timing failed")[0].split("## Times")[1]
    rows = list(csv.DictReader((out / "times.csv").open()))
    assert {"variant": "Flux", "refused": "needs a GPU"}.items() <= next(
        r for r in rows if r["variant"] == "Flux"
    ).items()
    assert {r["op"] for r in rows} == {"all_reduce", "reduce_scatter", "all_gather", "all_gather_matmul"}
