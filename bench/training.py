"""What a rank does for bench_train: it builds the variants of a training step, checks their gradients, times steps."""

from __future__ import annotations

import ctypes
import gc
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import pypar
from bench.harness import Case
from bench.models import CONFIGS, GPT, GPTConfig
from bench.pool import LIMIT_S, PoolVariant, Rank, RankPool

BATCH = {"tiny": 2, "small": 2, "large": 1}  # sequences per rank
BUCKET_MB = 25.0  # the default of DistributedDataParallel and of pypar.DataParallel
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of malloc.h
ERROR = 1e-4  # of the largest gradient of a tensor: float32 sums over the tokens in another order, with room


@dataclass(frozen=True)
class Way:
    """How the ranks share their gradients. wrapper: none, ddp (torch) or dp (pypar.DataParallel)."""

    wrapper: str
    backend: str = ""
    fuse: bool = True
    bucket_mb: float = BUCKET_MB


WAYS = {
    "none": Way("none"),
    "ddp-gloo": Way("ddp", "gloo"),
    "ddp-pypar": Way("ddp", "pypar"),
    "dp-gloo": Way("dp", "gloo"),
    "dp-gloo-copy": Way("dp", "gloo", fuse=False),
    "dp-pypar": Way("dp", "pypar"),
    "dp-pypar-copy": Way("dp", "pypar", fuse=False),
}


def keep_freed_memory() -> None:
    """Makes malloc keep what is freed, so that a step does not fault its gradients in anew.

    Otherwise the heap decides by its layout, which depends on the other variants of the run: beside four
    pypar.DataParallel a step of the large model without communication took 2290 ms, and takes 1820 with this.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # glibc has it
    if mallopt is not None:
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(M_MMAP_MAX, 0)


def case_of(model: str, num_ranks: int) -> Case:
    """nbytes: of all gradients."""
    with torch.device("meta"):
        num_params = sum(p.numel() for p in GPT(CONFIGS[model]).parameters())
    return Case(f"train_{model}", 4 * num_params, num_ranks)


def model_of(case: Case) -> str:
    return case.op.removeprefix("train_")


def tokens_per_step(case: Case) -> int:
    return case.ranks * BATCH[model_of(case)] * CONFIGS[model_of(case)].seq_len


class TrainRank(Rank):
    """Holds a model with its optimizer for every way, all of one configuration: another one replaces them."""

    def __init__(self, rank: int, world: int, folder: str, page: str, ways: dict[str, Way]):
        keep_freed_memory()
        super().__init__(rank, world, folder, page)
        self.ways = ways
        backends = sorted({way.backend for way in ways.values()} - {""})
        timeout = timedelta(seconds=LIMIT_S)
        self.groups = {backend: dist.new_group(backend=backend, timeout=timeout) for backend in backends}
        self.model = ""
        self.built: dict[str, Any] = {}

    def build(self, way: Way, config: GPTConfig) -> torch.nn.Module:
        torch.manual_seed(0)
        module: torch.nn.Module = GPT(config)
        if way.wrapper == "ddp":
            # Only None gives DDP its small first bucket, which pypar.DataParallel always has.
            cap_mb = None if way.bucket_mb == BUCKET_MB else way.bucket_mb
            return DistributedDataParallel(module, process_group=self.groups[way.backend], bucket_cap_mb=cap_mb)
        if way.wrapper == "dp":
            return pypar.DataParallel(
                module, self.groups[way.backend], bucket_size_mb=way.bucket_mb, fuse_linear_grads=way.fuse
            )
        return module

    def of(self, variant: str, case: Case) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
        if self.model != (model := model_of(case)):
            self.built.clear()
            gc.collect()  # the wrappers refer to themselves
            config, self.model, batch = CONFIGS[model], model, BATCH[model]
            torch.manual_seed(100)
            self.data = torch.randint(config.vocab_size, (self.world * batch, config.seq_len + 1))
            self.share = self.data[self.rank * batch : (self.rank + 1) * batch]
        if variant not in self.built:
            module = self.build(self.ways[variant], CONFIGS[model])
            self.built[variant] = module, torch.optim.AdamW(module.parameters(), lr=1e-4, fused=True)
        return self.built[variant]

    def measure(self, variant: str, case: Case, iters: int, num_samples: int) -> list[float]:
        module, optimizer = self.of(variant, case)
        us = []
        for _ in range(num_samples):
            self.barrier()
            start = time.perf_counter_ns()
            for _ in range(iters):
                module(self.share[:, :-1], self.share[:, 1:]).backward()
                optimizer.step()
                optimizer.zero_grad()
            us.append((time.perf_counter_ns() - start) / (1000 * iters))
        self.barrier()
        return us

    def verify(self, variant: str, case: Case) -> str:
        """Weights: the same on every rank. Loss and every gradient: of the whole batch, computed here without the
        wrapper and without peers, against the variant's, which sees the share of this rank. ("none" learns its share.)
        """
        module, _ = self.of(variant, case)
        is_alone = self.ways[variant].wrapper == "none"
        plain = module if is_alone else module.module
        names, params = zip(*plain.named_parameters(), strict=True)
        whole = self.share if is_alone else self.data
        expected = plain(whole[:, :-1], whole[:, 1:])
        wants = torch.autograd.grad(expected, params)  # leaves .grad alone, and no hook of a wrapper runs
        loss = module(self.share[:, :-1], self.share[:, 1:])
        loss.backward()
        wrong = _first_wrong(names, params, wants)
        module.zero_grad()
        if is_alone:
            return wrong and f"rank {self.rank}: {wrong}"
        mean = loss.detach().double()
        dist.all_reduce(mean)
        mean /= self.world
        if not abs(mean - expected) <= ERROR * abs(expected):
            wrong = f"the mean loss is {mean:g}, expected {expected:g}"
        sums = torch.stack([p.detach().double().sum() for p in params])
        of_ranks = [torch.empty_like(sums) for _ in range(self.world)]
        dist.all_gather(of_ranks, sums)
        differs = [
            name for name, values in zip(names, torch.stack(of_ranks, 1), strict=True) if values.unique().numel() > 1
        ]
        if differs:
            wrong = f"the ranks hold different weights, first {differs[0]}"
        return wrong and f"rank {self.rank}: {wrong}"


def _first_wrong(names: Sequence[str], params: Sequence[torch.Tensor], wants: Sequence[torch.Tensor]) -> str:
    for name, param, want in zip(names, params, wants, strict=True):
        if param.grad is None:
            return f"{name} has no gradient"
        off, largest = (param.grad - want).abs().max(), want.abs().max()
        if not off <= ERROR * largest:
            return f"the gradient of {name} is off by {off:.3g}, and its largest element is {largest:.3g}"
    return ""


class TrainVariant(PoolVariant):
    """A way of a pool of TrainRanks. choice: what goes into that column."""

    def __init__(self, name: str, pool: RankPool, way: Way):
        super().__init__(name, pool)
        self.choice = "" if way.wrapper == "none" else f"bucket {way.bucket_mb:g} MiB"
