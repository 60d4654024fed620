"""The ways of bench_train_pp: how the ranks of a pipeline run their micro-batches, and what makes a way right."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import pipelining

import pypar
from bench.harness import Case
from bench.models import CONFIGS, GPT, GPTConfig
from bench.steps import ERROR, Built, StepRank, first_wrong, model_of
from pypar.placement import cut

MICRO_BATCHES = 8
SEQUENCES = {"tiny": 1, "small": 1, "large": 1}  # of a micro-batch


@dataclass(frozen=True)
class Way:
    """kind: none (each rank the whole model on its half of the micro-batches), torch or pypar."""

    kind: str
    schedule: str = ""
    backend: str = ""
    split: str = "auto"


WAYS = {
    "none": Way("none"),
    "torch-gpipe-gloo": Way("torch", "ScheduleGPipe", "gloo"),
    "torch-1f1b-gloo": Way("torch", "Schedule1F1B", "gloo"),
    "torch-1f1b-pypar": Way("torch", "Schedule1F1B", "pypar"),
    "torch-zbv-gloo": Way("torch", "ScheduleZBVZeroBubble", "gloo"),
    "pp-gpipe-pypar": Way("pypar", "gpipe", "pypar"),
    "pp-1f1b-pypar": Way("pypar", "1f1b", "pypar"),
    "pp-zbh1-pypar": Way("pypar", "zbh1", "pypar"),
    "pp-zb2p-pypar": Way("pypar", "zb2p", "pypar"),
    "pp-zbv-pypar": Way("pypar", "zbv", "pypar"),
    "pp-gpipe-balanced": Way("pypar", "gpipe", "pypar", "balanced"),
    "pp-1f1b-balanced": Way("pypar", "1f1b", "pypar", "balanced"),
    "pp-zb2p-balanced": Way("pypar", "zb2p", "pypar", "balanced"),
    "pp-zbv-balanced": Way("pypar", "zbv", "pypar", "balanced"),
}


def tokens_per_step(case: Case) -> int:
    return MICRO_BATCHES * SEQUENCES[model_of(case)] * CONFIGS[model_of(case)].seq_len


def just_the_loss(output: torch.Tensor, _targets: torch.Tensor) -> torch.Tensor:
    return output


class TorchStage(nn.Module):
    """A stage of GPT as torch.distributed.pipelining wants it."""

    def __init__(self, model: GPT, blocks: list[str], is_first: bool, is_last: bool):
        super().__init__()
        self.embedding = model.embedding if is_first else None
        self.blocks = nn.ModuleDict({name.split(".")[1]: model.get_submodule(name) for name in blocks})
        self.norm, self.head = (model.norm, model.head) if is_last else (None, None)
        self.register_buffer("cos", model.cos, persistent=False)
        self.register_buffer("sin", model.sin, persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.embedding is not None:
            x = self.embedding(x)
        cos, sin = self.cos[: x.shape[1]], self.sin[: x.shape[1]]
        for block in self.blocks.values():
            x = block(x, cos, sin)
        return x if self.head is None else self.head(self.norm(x))


class PipelineRank(StepRank):
    def num_sequences(self, model: str) -> int:
        return MICRO_BATCHES * SEQUENCES[model]

    def share_of(self, data: torch.Tensor) -> torch.Tensor:
        return data

    def build(self, way: Way, config: GPTConfig) -> Built:
        model = GPT(config)
        if way.kind == "pypar":
            group = self.groups[way.backend]
            module: nn.Module = pypar.Pipeline(
                model, group, schedule=way.schedule, micro_batches=MICRO_BATCHES, split=way.split
            )
        elif way.kind == "torch":
            module = self.build_torch(way, model)
        else:
            module = model
        # The baseline's optimizer has a rank's share of the parameters to step, as the others' have.
        mine = list(module.parameters())
        if way.kind == "none":
            stages = cut(model, self.world).of_stage(self.rank)
            mine = [p for part in stages for p in part.module.parameters()]
        return Built(module, torch.optim.AdamW(mine, lr=1e-4, fused=True))

    def build_torch(self, way: Way, model: GPT) -> nn.Module:
        kind: Any = getattr(pipelining, way.schedule)
        is_v = "ZBV" in way.schedule
        count = self.world * (2 if is_v else 1)
        parts = cut(model, count)
        here = [self.rank, count - 1 - self.rank] if is_v else [self.rank]
        modules = [
            TorchStage(model, [p.name for p in parts.of_stage(s) if p.is_block], s == 0, s == count - 1) for s in here
        ]
        stages = [
            pipelining.PipelineStage(module, s, count, torch.device("cpu"), group=self.groups[way.backend])
            for module, s in zip(modules, here, strict=True)
        ]

        def loss_of(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            return nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())

        schedule = kind(stages if is_v else stages[0], MICRO_BATCHES, loss_fn=loss_of)
        whole = nn.ModuleList(modules)
        whole.schedule, whole.here, whole.count = schedule, here, count  # type: ignore[assignment]
        return whole

    def step(self, built: Built) -> None:
        super().step(built)
        built.module.zero_grad()  # of "none" also what its optimizer doesn't step

    def learn(self, built: Built) -> torch.Tensor:
        module: Any = built.module
        tokens, targets = self.share[:, :-1], self.share[:, 1:]
        if isinstance(module, pypar.Pipeline):
            return module.train_step(((tokens, targets), targets), just_the_loss)
        if isinstance(module, GPT):
            total = torch.zeros(())
            halves = list(zip(tokens.chunk(MICRO_BATCHES), targets.chunk(MICRO_BATCHES), strict=True))
            for x, y in halves[self.rank :: self.world]:
                loss = module(x, y) / MICRO_BATCHES
                loss.backward()
                total += loss.detach()
            return total
        losses: list[torch.Tensor] = []
        first = (tokens,) if 0 in module.here else ()
        if module.count - 1 in module.here:
            module.schedule.step(*first, target=targets, losses=losses)
            return torch.stack(losses).mean()
        module.schedule.step(*first)
        return torch.zeros(())

    def verify(self, variant: str, case: Case) -> str:
        """Loss and every gradient against one process, on the rank that holds them. "none": of its half."""
        built, way = self.of(variant, case), self.ways[variant]
        plain = GPT(CONFIGS[model_of(case)])
        state = {name: tensor for name, tensor in self.named(built.module, lambda p: p)}
        plain.load_state_dict(state if way.kind == "none" else self.union(state))
        names, params = zip(*plain.named_parameters(), strict=True)
        tokens, targets = self.data[:, :-1], self.data[:, 1:]
        if way.kind == "none":
            tokens, targets = tokens[self.rank :: self.world], targets[self.rank :: self.world]
        expected = plain(tokens, targets)
        wants = dict(zip(names, torch.autograd.grad(expected, params), strict=True))
        loss = self.learn(built)
        mine = dict(self.named(built.module, lambda p: p.grad))
        share = 1 / self.world if way.kind == "none" else 1.0
        wrong = first_wrong(list(mine), list(mine.values()), [share * wants[name] for name in mine])
        has_loss = way.kind != "torch" or built.module.count - 1 in built.module.here
        if has_loss and not abs(loss - share * expected) <= ERROR * abs(expected):
            wrong = f"the loss is {loss:g}, expected {share * expected:g}"
        built.module.zero_grad()
        return wrong and f"rank {self.rank}: {wrong}"

    def named(self, module: nn.Module, of: Callable[[nn.Parameter], Any]) -> list[tuple[str, Any]]:
        """Under the names of the whole model."""
        if isinstance(module, pypar.Pipeline):
            return [(name, of(p)) for name, p in module.module.named_parameters()]
        if isinstance(module, GPT):
            return [(name, of(p)) for name, p in module.named_parameters()]
        return [(name.split(".", 1)[1], of(p)) for name, p in module.named_parameters()]

    def union(self, mine: dict[str, Any]) -> dict[str, torch.Tensor]:
        everyone: list[Any] = [None] * self.world
        dist.all_gather_object(everyone, {name: tensor.detach() for name, tensor in mine.items()})
        return {name: tensor for each in everyone for name, tensor in each.items()}
