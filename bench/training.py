"""The ways of bench_train: how the ranks of data parallel share their gradients, and what makes a way right."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import pypar
from bench.harness import Case
from bench.models import CONFIGS, GPT, GPTConfig
from bench.steps import ERROR, Built, StepRank, first_wrong, model_of

BATCH = {"tiny": 2, "small": 2, "large": 1}  # sequences per rank
BUCKET_MB = 25.0  # the default of DistributedDataParallel and of pypar.DataParallel


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


def tokens_per_step(case: Case) -> int:
    return case.ranks * BATCH[model_of(case)] * CONFIGS[model_of(case)].seq_len


def choice_of(way: Way) -> str:
    return "" if way.wrapper == "none" else f"bucket {way.bucket_mb:g} MiB"


class TrainRank(StepRank):
    """Ranks that feed a share of the batch each."""

    def num_sequences(self, model: str) -> int:
        return self.world * BATCH[model]

    def share_of(self, data: torch.Tensor) -> torch.Tensor:
        return data.chunk(self.world)[self.rank]

    def build(self, way: Way, config: GPTConfig) -> Built:
        module = self.wrap(way, GPT(config))
        return Built(module, torch.optim.AdamW(module.parameters(), lr=1e-4, fused=True))

    def wrap(self, way: Way, module: torch.nn.Module) -> torch.nn.Module:
        if way.wrapper == "ddp":
            # Only None gives DDP its small first bucket, which pypar.DataParallel always has.
            cap_mb = None if way.bucket_mb == BUCKET_MB else way.bucket_mb
            return DistributedDataParallel(module, process_group=self.groups[way.backend], bucket_cap_mb=cap_mb)
        if way.wrapper == "dp":
            return pypar.DataParallel(
                module, self.groups[way.backend], bucket_size_mb=way.bucket_mb, fuse_linear_grads=way.fuse
            )
        return module

    def verify(self, variant: str, case: Case) -> str:
        """Weights: the same on every rank. Loss and every gradient: of the whole batch, computed here without the
        wrapper and without peers, against the variant's, which sees the share of this rank. ("none" learns its share.)
        """
        built = self.of(variant, case)
        is_alone = self.ways[variant].wrapper == "none"
        plain = built.module if is_alone else built.module.module
        names, params = zip(*plain.named_parameters(), strict=True)
        whole = self.share if is_alone else self.data
        expected = plain(whole[:, :-1], whole[:, 1:])
        wants = torch.autograd.grad(expected, params)  # leaves .grad alone, and no hook of a wrapper runs
        loss = self.learn(built)
        wrong = first_wrong(names, [p.grad for p in params], wants)
        built.module.zero_grad()
        if is_alone:
            return wrong and f"rank {self.rank}: {wrong}"
        mean = loss.detach().double()
        dist.all_reduce(mean)
        mean /= self.world
        if not abs(mean - expected) <= ERROR * abs(expected):
            wrong = f"the mean loss is {mean:g}, expected {expected:g}"
        wrong = self.differ(names, params) or wrong
        return wrong and f"rank {self.rank}: {wrong}"
