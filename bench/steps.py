"""What a rank does for a bench of training steps: a model with its optimizer for each way, timed steps, a profile."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from bench import breakdown
from bench.harness import Case
from bench.models import CONFIGS, GPT, GPTConfig
from bench.pool import LIMIT_S, PoolVariant, Rank, RankPool

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of malloc.h
ERROR = 1e-4  # of the largest gradient of a tensor: float32 sums over the tokens in another order, with room


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


@dataclass
class Built:
    """A model that learns. around: a context for forward and backward."""

    module: torch.nn.Module
    optimizer: torch.optim.Optimizer
    around: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext


class StepRank(Rank):
    """Holds what build() makes for every way, all of one configuration: another one replaces them.

    ways: name of a variant -> how its ranks work together; whatever build() of the subclass takes, with a backend.
    """

    def __init__(self, rank: int, world: int, folder: str, page: str, ways: dict[str, Any]):
        keep_freed_memory()
        super().__init__(rank, world, folder, page)
        self.ways = ways
        backends = sorted({way.backend for way in ways.values()} - {""})
        timeout = timedelta(seconds=LIMIT_S)
        self.groups = {backend: dist.new_group(backend=backend, timeout=timeout) for backend in backends}
        self.model = ""
        self.built: dict[str, Built] = {}
        self.spent: dict[str, list[tuple[int, int]]] = {}  # (ns of a sample, of the processor meanwhile), by variant

    def num_sequences(self, model: str) -> int:
        """Of the whole batch."""
        raise NotImplementedError

    def share_of(self, data: torch.Tensor) -> torch.Tensor:
        """What this rank feeds of the whole batch [sequences, seq_len + 1]."""
        raise NotImplementedError

    def build(self, way: Any, config: GPTConfig) -> Built:
        raise NotImplementedError

    def of(self, variant: str, case: Case) -> Built:
        if self.model != (model := model_of(case)):
            self.built.clear()
            gc.collect()  # the wrappers refer to themselves
            config, self.model = CONFIGS[model], model
            torch.manual_seed(100)
            self.data = torch.randint(config.vocab_size, (self.num_sequences(model), config.seq_len + 1))
            self.share = self.share_of(self.data)
        if variant not in self.built:
            torch.manual_seed(0)
            self.built[variant] = self.build(self.ways[variant], CONFIGS[model])
        return self.built[variant]

    def learn(self, built: Built) -> torch.Tensor:
        """Forward and backward; the loss."""
        with built.around():
            loss = built.module(self.share[:, :-1], self.share[:, 1:])
            loss.backward()
        return loss

    def step(self, built: Built) -> None:
        self.learn(built)
        built.optimizer.step()
        built.optimizer.zero_grad()

    def measure(self, variant: str, case: Case, iters: int, num_samples: int) -> list[float]:
        built = self.of(variant, case)
        us = []
        for _ in range(num_samples):
            self.barrier()
            start, on_core = time.perf_counter_ns(), time.thread_time_ns()
            for _ in range(iters):
                self.step(built)
            ns = time.perf_counter_ns() - start
            us.append(ns / (1000 * iters))
            self.spent.setdefault(variant, []).append((ns, time.thread_time_ns() - on_core))
        self.barrier()
        return us

    def off_core(self, variant: str) -> float:
        """Per cent of the time of the samples so far. Of a variant that waits for nobody: what other processes took.
        NaN where these ranks took no sample: they were started after one that failed."""
        ns, on_core = (sum(each) for each in zip(*self.spent.get(variant, [(0, 0)]), strict=True))
        return 100 * (1 - on_core / ns) if ns else math.nan

    def profile(self, variant: str, case: Case, num_steps: int) -> list[breakdown.StepProfile]:
        built = self.of(variant, case)
        return breakdown.profile(lambda: self.step(built), self.barrier, num_steps)

    def differ(self, names: Iterable[str], values: Iterable[torch.Tensor]) -> str:
        """What is wrong where a tensor differs between ranks, by the sum of its elements; "" where none does."""
        sums = torch.stack([value.detach().double().sum() for value in values])
        of_ranks = [torch.empty_like(sums) for _ in range(self.world)]
        dist.all_gather(of_ranks, sums)
        spread = torch.stack(of_ranks, 1)
        differs = [name for name, of in zip(names, spread, strict=True) if of.unique().numel() > 1]
        return f"the ranks hold different weights, first {differs[0]}" if differs else ""


def first_wrong(names: Sequence[str], grads: Sequence[torch.Tensor | None], wants: Sequence[torch.Tensor]) -> str:
    """The first gradient that isn't there or is off; "" when all are right."""
    for name, grad, want in zip(names, grads, wants, strict=True):
        if grad is None:
            return f"{name} has no gradient"
        off, largest = (grad - want).abs().max(), want.abs().max()
        if not off <= ERROR * largest:
            return f"the gradient of {name} is off by {off:.3g}, and its largest element is {largest:.3g}"
    return ""


class StepVariant(PoolVariant):
    """A way of a pool of StepRanks. choice: what goes into that column."""

    def __init__(self, name: str, pool: RankPool, choice: str = ""):
        super().__init__(name, pool)
        self.choice = choice

    def profile(self, case: Case, num_steps: int) -> dict[str, float]:
        """Microseconds of a step by category of the breakdown, of the least disturbed of num_steps."""
        return breakdown.merge(breakdown.least_disturbed(self._pool.ask("profile", self.name, case, num_steps)))
