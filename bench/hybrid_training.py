"""The ways of bench_train_hybrid: several methods at once, pypar's and torch's, and what makes a way right."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import pipelining
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import loss_parallel
from torch.distributed.tensor.parallel.ddp import _pre_dp_module_transform
from torch.nn.parallel import DistributedDataParallel

import pypar
from bench.alone import cut_alone
from bench.harness import Case
from bench.models import CONFIGS, GPT, GPTConfig
from bench.pipeline_training import TorchStage, just_the_loss
from bench.pool import LIMIT_S
from bench.steps import ERROR, Built, StepRank, first_wrong, model_of
from bench.tensor_training import optimizer_of, parallelize_with_torch, whole
from pypar.placement import cut

MICRO_BATCHES = 8  # of a pipeline
SEQUENCES = 8  # of the whole batch
DP, TP, PP = 2, 2, 2


@dataclass(frozen=True)
class Way:
    """kind: none (compute alone), torch, or pypar. layout: "dp" (dp 2 x tp 2) or "pp" (pp 2 x tp 2)."""

    kind: str
    layout: str
    zero: int = 0
    schedule: str = "1f1b"
    split: str = "auto"
    backend: str = ""


WAYS = {
    "none-dp": Way("none", "dp"),
    "none-dp-zero": Way("none", "dp", zero=1),
    "none-pp": Way("none", "pp"),
    "dp-tp": Way("pypar", "dp", backend="pypar"),
    "dp-tp-zero1": Way("pypar", "dp", zero=1, backend="pypar"),
    "dp-tp-zero3": Way("pypar", "dp", zero=3, backend="pypar"),
    "pp-tp-1f1b": Way("pypar", "pp", backend="pypar"),
    "pp-tp-zbv": Way("pypar", "pp", schedule="zbv", split="balanced", backend="pypar"),
    "torch-dp-tp": Way("torch", "dp", backend="gloo"),
    "torch-fsdp-tp": Way("torch", "dp", zero=3, backend="gloo"),
    "torch-pp-tp": Way("torch", "pp", backend="gloo"),
}


def tokens_per_step(case: Case) -> int:
    return SEQUENCES * CONFIGS[model_of(case)].seq_len


class HybridRank(StepRank):
    """Four ranks: two neighbours share a copy of the model, or of a stage."""

    backend = "pypar"

    def __init__(self, *args: Any):
        super().__init__(*args)
        self.outer, self.tp_rank = divmod(self.rank, TP)
        timeout = timedelta(seconds=LIMIT_S)
        self.alone = dist.new_subgroups(1, backend="pypar")[0]
        rows = [[0, 1], [2, 3]]
        self.gloo = {
            "tp": [dist.new_group(row, backend="gloo", timeout=timeout) for row in rows][self.outer],
            "outer": [dist.new_group(list(c), backend="gloo", timeout=timeout) for c in zip(*rows, strict=True)][
                self.tp_rank
            ],
        }

    def num_sequences(self, model: str) -> int:
        return SEQUENCES

    def share_of(self, data: torch.Tensor) -> torch.Tensor:
        return data

    def mine(self, way: Way) -> torch.Tensor:
        """What this rank feeds."""
        return self.share.chunk(DP)[self.outer] if way.layout == "dp" else self.share

    def build(self, way: Way, config: GPTConfig) -> Built:
        model = GPT(config)
        if way.kind == "none":
            return self.build_alone(way, model)
        if way.kind == "torch":
            return self.build_torch(way, model)
        plan = pypar.Plan(
            pp=PP if way.layout == "pp" else 1, dp=DP if way.layout == "dp" else 1, tp=TP, zero=way.zero,
            schedule=way.schedule, split=way.split, micro_batches=MICRO_BATCHES if way.layout == "pp" else 1,
            loss_parallel=True,
        )  # fmt: skip
        shared, optimizer = pypar.parallelize(model, plan, torch.optim.AdamW, lr=1e-4, fused=True)
        model.loss = pypar.VocabParallelCrossEntropy(group=shared.axes.tp_group)
        return Built(shared, optimizer)

    def build_alone(self, way: Way, model: GPT) -> Built:
        """Its optimizer steps as many parameters as a rank of the others does."""
        cut_alone(model, self.tp_rank, TP, self.alone, False)
        mine = list(model.parameters())
        if way.layout == "pp":
            mine = [p for part in cut(model, PP).of_stage(self.outer) for p in part.module.parameters()]
        elif way.zero:
            mine = mine[self.outer :: DP]
        return Built(model, torch.optim.AdamW(mine, lr=1e-4, fused=True))

    def build_torch(self, way: Way, model: GPT) -> Built:
        groups = [self.gloo["outer"], self.gloo["tp"]]
        names = ("outer", "tp")
        mesh = DeviceMesh.from_group(groups, "cpu", mesh=torch.arange(4).view(2, TP), mesh_dim_names=names)
        parallelize_with_torch(model, mesh["tp"], False)
        if way.layout == "pp":
            parts = cut(model, PP)
            blocks = [part.name for part in parts.of_stage(self.outer) if part.is_block]
            module = TorchStage(model, blocks, self.outer == 0, self.outer == PP - 1)
            stage = pipelining.PipelineStage(module, self.outer, PP, torch.device("cpu"), group=self.gloo["outer"])

            def loss_of(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
                return nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())

            module.schedule = pipelining.Schedule1F1B(stage, MICRO_BATCHES, loss_fn=loss_of)  # type: ignore[assignment]
            return Built(module, optimizer_of(module), loss_parallel)
        if way.zero:
            for block in model.blocks:
                fully_shard(block, mesh=mesh["outer"])
            fully_shard(model, mesh=mesh["outer"])
            return Built(model, optimizer_of(model), loss_parallel)
        _pre_dp_module_transform(model)
        module = DistributedDataParallel(model, process_group=self.gloo["outer"])
        return Built(module, optimizer_of(module), loss_parallel)

    def step(self, built: Built) -> None:
        super().step(built)
        built.module.zero_grad()  # also what the optimizer of a baseline doesn't step

    def learn(self, built: Built) -> torch.Tensor:
        way = next(self.ways[name] for name, each in self.built.items() if each is built)
        share = self.mine(way)
        tokens, targets = share[:, :-1], share[:, 1:]
        if way.kind == "pypar":
            return built.module.train_step(((tokens, targets), targets), just_the_loss)  # type: ignore[operator]
        with built.around():
            if way.kind == "none" and way.layout == "pp":
                parts = list(zip(tokens.chunk(MICRO_BATCHES), targets.chunk(MICRO_BATCHES), strict=True))
                for x, y in parts[self.outer :: PP]:
                    loss = built.module(x, y) / MICRO_BATCHES
                    loss.backward()
                return loss.detach()
            if way.layout == "pp":
                losses: list[torch.Tensor] = []
                schedule: Any = built.module.schedule
                if self.outer == PP - 1:
                    schedule.step(target=targets, losses=losses)
                    return torch.stack([whole(each) for each in losses]).mean()
                schedule.step(tokens)
                return torch.zeros(())
            loss = built.module(tokens, targets)
            loss.backward()
        return whole(loss.detach())

    def verify(self, variant: str, case: Case) -> str:
        """Of pypar's ways loss and every gradient, on rank 0 against one process with the same weights; of the others
        that gradients are there and finite."""
        built, way = self.of(variant, case), self.ways[variant]
        wrong = ""
        if way.kind == "pypar":
            shared: Any = built.module
            state, loss = pypar.gather_state(shared), self.learn(built)
            grads = pypar.gather_grads(shared)
            if self.rank == 0:
                plain = GPT(CONFIGS[model_of(case)])
                plain.load_state_dict(state)
                names, params = zip(*plain.named_parameters(), strict=True)
                expected = plain(self.data[:, :-1], self.data[:, 1:])
                wants = torch.autograd.grad(expected, params)
                wrong = first_wrong(names, [grads.get(name) for name in names], wants)
                if not abs(loss - expected) <= ERROR * abs(expected):
                    wrong = f"the loss is {loss:g}, expected {expected:g}"
        else:
            self.learn(built)
            for name, param in built.module.named_parameters():
                if param.grad is None or not whole(param.grad).isfinite().all():
                    wrong = wrong or f"{name} has no finite gradient"
        built.optimizer.zero_grad()
        built.module.zero_grad()
        return wrong and f"rank {self.rank}: {wrong}"
