"""Groups and ranks: how a process joins the job. Keeps no state of its own; torch.distributed does."""

from __future__ import annotations

import os
from datetime import timedelta

import torch
import torch.distributed as dist


def init(backend: str | None = None, timeout: timedelta | None = None) -> None:
    """Join the job: under torchrun as it says, alone as a world of one.

    backend: default "pypar" on CPU ("gloo" when the compiled extension is absent), "cpu:pypar,cuda:nccl" with CUDA.
    timeout: of every wait; default 30 minutes, as torch.distributed's.
    Does nothing when torch.distributed is initialised already.
    """
    if dist.is_initialized():
        return
    from pypar import backend as pypar_backend

    if backend is None:
        cpu = "pypar" if pypar_backend.available() else "gloo"
        backend = f"cpu:{cpu},cuda:nccl" if torch.cuda.is_available() else cpu
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        dist.init_process_group(backend, timeout=timeout)
    else:
        dist.init_process_group(backend, timeout=timeout, store=dist.HashStore(), rank=0, world_size=1)
