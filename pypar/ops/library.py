"""Where the ops of `torch.ops.pypar` are declared; the compiled kernels register themselves when they are loaded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from pypar import backend
from pypar.reference.collectives import VIRTUAL_SHARDS as VIRTUAL_SHARDS
from pypar.reference.collectives import is_layout as is_layout
from pypar.reference.collectives import virtual_shards as virtual_shards

LIBRARY = torch.library.Library("pypar", "DEF")


def define(schema: str, reference: Callable, fake: Callable, gpu: Callable | None = None) -> None:
    """Declares an op. Its reference serves as the CPU kernel only where the compiled extension is absent, and for CUDA
    tensors where there is no `gpu`, which chooses a kernel."""
    name = schema.split("(")[0]
    LIBRARY.define(schema)
    if not backend.available():
        LIBRARY.impl(name, reference, "CPU")
    LIBRARY.impl(name, gpu or reference, "CUDA")
    torch.library.register_fake(f"pypar::{name}", fake, lib=LIBRARY)


def name_of(group: dist.ProcessGroup | str | None) -> str:
    """The name by which the ops know a group; None is the world."""
    if isinstance(group, str):
        return group
    if group is None:
        group = dist.group.WORLD
    if group is None:
        raise RuntimeError("no process group: call pypar.init() (or torch.distributed.init_process_group) first")
    return group.group_name


def autocast(like: torch.Tensor, *tensors: torch.Tensor | None) -> list[Any]:
    """The tensors as torch's own matmuls cast them, where autocast is on for the device of `like`."""
    device = like.device.type
    if not torch.is_autocast_enabled(device):
        return list(tensors)
    dtype = torch.get_autocast_dtype(device)
    return [t.to(dtype) if t is not None else None for t in tensors]
