"""Other people's overlapped matmuls, beside which ours are timed where they are installed.

torch async-TP: `torch.ops.symm_mem.fused_*`, of the torch that runs. TransformerEngine: its userbuffers, by the API of
2.x, `module.base.initialize_ub` and then `Linear` with `ub_overlap_ag` or `ub_overlap_rs`. Flux (bytedance/flux):
`AGKernel` and `GemmRS` as of 1.1 (2025). The calls of these two are written after their sources and were not run.

TransformerEngine asks for CUDA_DEVICE_MAX_CONNECTIONS=1, with which other peers may be slower: it is left to whoever
starts `make gpu`, and the report says what it was.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
import torch.distributed as dist

Run = Callable[[], Any]
Make = Callable[[], AbstractContextManager[Run]]


def _module(name: str) -> Any:
    top = name.split(".")[0]
    if top not in sys.modules and importlib.util.find_spec(top) is None:
        raise RuntimeError("not installed")
    return importlib.import_module(name)


@contextmanager
def async_tp(op: str, x: torch.Tensor, w: torch.Tensor) -> Iterator[Run]:
    name, group_name = f"fused_{op}", dist.group.WORLD.group_name
    if not torch._C._dispatch_has_kernel_for_dispatch_key(f"symm_mem::{name}", x.device.type.upper()):
        raise RuntimeError(f"torch has none for {x.device.type}")
    fused, b = getattr(torch.ops.symm_mem, name), w.t()
    if op == "all_gather_matmul":
        yield lambda: fused(x, [b], 0, group_name, return_A=False)[1][0]
    else:
        yield lambda: fused(x, b, "sum", 0, group_name)


@contextmanager
def transformer_engine(op: str, x: torch.Tensor, w: torch.Tensor) -> Iterator[Run]:
    """The buffers belong to the process, under the names of a transformer's layers: one Linear at a time has them."""
    engine, world = _module("transformer_engine.pytorch"), dist.get_world_size()
    base = engine.module.base
    if not _module("transformer_engine_torch").device_supports_multicast():
        os.environ["UB_SKIPMC"] = "1"  # without it initialize_ub refuses such a GPU
    if op == "all_gather_matmul":  # x [M/R, K], w [N/R, K]
        buffer = [len(x) * world, x.shape[1]]
        sizes, how = (x.shape[1], len(w) * world), {"parallel_mode": "column", "ub_overlap_ag": True, "ub_name": "qkv"}
    else:  # x [M, K/R], w [N, K/R]
        buffer = [len(x), len(w)]
        sizes, how = (x.shape[1] * world, len(w)), {"parallel_mode": "row", "ub_overlap_rs": True, "ub_name": "proj"}
    modes = getattr(base, "UserBufferQuantizationMode", None)  # younger than 2.0
    given = {} if modes is None else {"quantization_modes": [modes.NONE]}
    try:
        base.initialize_ub(buffer, world, dtype=x.dtype, bootstrap_backend="gloo", **given)
        layer = engine.Linear(
            *sizes, bias=False, params_dtype=x.dtype, device=x.device, tp_group=dist.group.WORLD, tp_size=world,
            sequence_parallel=True, **how,
        )  # fmt: skip
        with torch.no_grad():
            layer.weight.copy_(w)

        def run() -> torch.Tensor:
            with torch.no_grad():
                return layer(x)

        yield run
    finally:
        base.destroy_ub()


@functools.cache
def _started(module: Any) -> None:
    """Once for the process."""
    module.init_flux_shm(dist.group.WORLD)


@contextmanager
def flux(op: str, x: torch.Tensor, w: torch.Tensor) -> Iterator[Run]:
    module, group, hosts = _module("flux"), dist.group.WORLD, 1
    gather = op == "all_gather_matmul"
    make = module.AGKernel if gather else module.GemmRS  # an AttributeError where another package has that name
    _started(module)
    if gather:
        kernel = make(group, hosts, len(x) * group.size(), len(w), x.shape[1], x.dtype, output_dtype=x.dtype)
        yield lambda: kernel.forward(x, w, transpose_weight=False)
    else:
        most = -(-len(x) // 1024) * 1024  # as its own tests do: the kernel pads to whole tiles
        kernel = make(group, hosts, most, len(w), x.dtype, x.dtype, transpose_weight=False)
        yield lambda: kernel.forward(x, w).reshape(len(x) // group.size(), len(w))


PEERS = {"torch async-TP": async_tp, "TransformerEngine": transformer_engine, "Flux": flux}


def peers_of(op: str, x: torch.Tensor, w: torch.Tensor) -> dict[str, Make]:
    """Of all_gather_matmul, x [M/R, K] and w [N/R, K], or matmul_reduce_scatter, x [M, K/R] and w [N, K/R]: what makes
    each one ready, and raises where it isn't installed or doesn't take such operands."""
    return {name: functools.partial(make, op, x, w) for name, make in PEERS.items()}
