"""Groups and ranks: how a process joins the job. Keeps no state of its own; torch.distributed does."""

from __future__ import annotations

import os
import time
import uuid
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.constants import default_pg_timeout as DEFAULT_TIMEOUT


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
        if int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) == 0:
            dist.init_process_group(backend, timeout=timeout)
            return
        store, rank, world_size = next(dist.rendezvous("env://", timeout=timeout or DEFAULT_TIMEOUT))
        prefix = attempt_of(store, rank, world_size, timeout or DEFAULT_TIMEOUT)
        fresh = dist.PrefixStore(prefix, store)
        dist.init_process_group(backend, timeout=timeout, store=fresh, rank=rank, world_size=world_size)
    else:
        dist.init_process_group(backend, timeout=timeout, store=dist.HashStore(), rank=0, world_size=1)


def attempt_of(store: dist.Store, rank: int, world_size: int, timeout: timedelta) -> str:
    """A name that the ranks of this start of the job have in common, and no other start has.

    torchrun keeps one store for all restarts (torch 2.13), in which the addresses of dead ranks still stand: read by a
    rank that is quicker than their successors. So each rank says a number of its own, and rank 0 answers under it; what
    it answered to a dead one nobody reads, and a number that changes it answers again.
    Raises TimeoutError.
    """
    mine, deadline = uuid.uuid4().hex, time.monotonic() + timeout.total_seconds()
    store.set(f"pypar/hello/{rank}", mine)
    if rank != 0:
        store.wait([f"pypar/name/{mine}"], timeout)
        name = store.get(f"pypar/name/{mine}").decode()
        store.set(f"pypar/heard/{name}/{rank}", "")
        return name
    answered: set[str] = set()
    while not all(store.check([f"pypar/heard/{mine}/{other}"]) for other in range(1, world_size)):
        for other in range(1, world_size):
            if store.check([f"pypar/hello/{other}"]):
                number = store.get(f"pypar/hello/{other}").decode()
                if number not in answered:
                    answered.add(number)
                    store.set(f"pypar/name/{number}", mine)
        if time.monotonic() > deadline:
            raise TimeoutError(f"pypar.init: not all of the {world_size} ranks have come within {timeout}")
        time.sleep(0.005)
    return mine
