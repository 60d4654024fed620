"""The ways of bench_train_zero: how ranks share out what they would all hold, and what makes a way right."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import pypar
from bench.harness import Case
from bench.models import CONFIGS, GPT, GPTConfig
from bench.steps import ERROR, Built, first_wrong, model_of
from bench.training import BATCH, TrainRank

# A gradient near zero is stepped by lr * g / (|g| + eps): with this eps what float32 sums differ by stays small.
SETTINGS: dict[str, Any] = {"lr": 1e-4, "eps": 1e-5, "weight_decay": 0.01}
STEP_ERROR = 0.05  # of lr


@dataclass(frozen=True)
class ZeroWay:
    """kind: none (each rank alone, stepping its share of the parameters), zero (pypar.Zero), or of the peers ddp, fsdp,
    redundancy (ZeroRedundancyOptimizer), deepspeed. stage: of zero and deepspeed."""

    kind: str
    backend: str = ""
    stage: int = 0


WAYS = {
    "none": ZeroWay("none"),
    **{f"zero-{stage}": ZeroWay("zero", "pypar", stage) for stage in (1, 2, 3)},
    "ddp-gloo": ZeroWay("ddp", "gloo"),
    "redundancy-gloo": ZeroWay("redundancy", "gloo"),
    "fsdp2-gloo": ZeroWay("fsdp", "gloo"),
    "fsdp2-pypar": ZeroWay("fsdp", "pypar"),
    **{f"deepspeed-{stage}": ZeroWay("deepspeed", "gloo", stage) for stage in (1, 2, 3)},
}


def has_deepspeed() -> bool:
    return importlib.util.find_spec("deepspeed") is not None


class ShareOfAdamW(torch.optim.AdamW):
    """Steps about 1/world of the module's parameters, the largest first to whoever has the least; clears all."""

    def __init__(self, module: nn.Module, rank: int, world: int):
        shares: list[list[nn.Parameter]] = [[] for _ in range(world)]
        numels = [0] * world
        for parameter in sorted(module.parameters(), key=lambda p: p.numel(), reverse=True):
            least = numels.index(min(numels))
            shares[least].append(parameter)
            numels[least] += parameter.numel()
        self.module, self.percent = module, 100 * numels[rank] / sum(numels)
        super().__init__(shares[rank], fused=True, **SETTINGS)

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.module.zero_grad(set_to_none)


class EngineOptimizer:
    """DeepSpeed's engine where an optimizer is expected; its step clears the gradients."""

    def __init__(self, engine: Any):
        self.engine = engine

    def step(self) -> None:
        self.engine.step()

    def zero_grad(self) -> None: ...


class ZeroTrainRank(TrainRank):
    def build(self, way: Any, config: GPTConfig) -> Built:
        module: Any = GPT(config)
        group = self.groups.get(way.backend)
        if way.kind == "none":
            return Built(module, ShareOfAdamW(module, self.rank, self.world))
        if way.kind == "zero":
            zero = pypar.Zero(module, group, stage=way.stage, optimizer=torch.optim.AdamW, **SETTINGS)
            return Built(zero, zero.optimizer)
        if way.kind == "deepspeed":
            return self._build_deepspeed(module, way)
        if way.kind == "fsdp":
            mesh = DeviceMesh.from_group(group, "cpu")
            for block in module.blocks:
                fully_shard(block, mesh=mesh)
            fully_shard(module, mesh=mesh)
        else:
            module = DistributedDataParallel(module, process_group=group, gradient_as_bucket_view=True)
        if way.kind == "redundancy":
            optimizer = ZeroRedundancyOptimizer(
                module.parameters(), torch.optim.AdamW, process_group=group, fused=True, **SETTINGS
            )
            return Built(module, optimizer)
        return Built(module, torch.optim.AdamW(module.parameters(), fused=True, **SETTINGS))

    def _build_deepspeed(self, module: GPT, way: ZeroWay) -> Built:
        import deepspeed

        os.environ |= {"LOCAL_RANK": str(self.rank), "LOCAL_SIZE": str(self.world)}  # as its launcher does
        config = {
            "train_micro_batch_size_per_gpu": BATCH[self.model],
            "zero_optimization": {"stage": way.stage},
            "zero_allow_untested_optimizer": True,
            "gradient_clipping": 0.0,  # else it clips to 1.0
        }
        optimizer = torch.optim.AdamW(module.parameters(), fused=True, **SETTINGS)
        engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=config)
        return Built(engine, EngineOptimizer(engine))  # type: ignore[arg-type]

    def learn(self, built: Built) -> torch.Tensor:
        if not isinstance(built.optimizer, EngineOptimizer):
            return super().learn(built)
        loss = built.module(self.share[:, :-1], self.share[:, 1:])
        built.optimizer.engine.backward(loss)
        return loss

    # -- what is right ---------------------------------------------------------------------------------------------

    def verify(self, variant: str, case: Case) -> str:
        """Loss and every gradient of the whole batch, against one process with the gathered weights; the first step
        from there against AdamW's formula; the same weights on every rank. "none": of its share, and that it steps a
        1/W of the parameters."""
        is_new = variant not in self.built or self.model != model_of(case)
        built, way = self.of(variant, case), self.ways[variant]
        is_alone = way.kind == "none"
        plain = GPT(CONFIGS[model_of(case)])
        names, params = zip(*plain.named_parameters(), strict=True)
        plain.load_state_dict(self.weights(built, way))
        whole = self.share if is_alone else self.data
        expected = plain(whole[:, :-1], whole[:, 1:])
        wants = torch.autograd.grad(expected, params)
        mean = self.learn(built).detach().double()
        wrong = first_wrong(names, [self.gradients(built, way).get(name) for name in names], wants)
        if is_alone:
            share = built.optimizer.percent * self.world  # type: ignore[attr-defined]
            wrong = wrong or ("" if abs(share - 100) < 2 else f"{share:.1f} % of a share is stepped")
            built.optimizer.zero_grad()
            return wrong and f"rank {self.rank}: {wrong}"
        dist.all_reduce(mean)
        mean /= self.world
        if not abs(mean - expected) <= ERROR * abs(expected):
            wrong = f"the mean loss is {mean:g}, expected {expected:g}"
        built.optimizer.step()
        after = self.weights(built, way)
        if is_new:
            wrong = wrong or first_step_wrong(names, params, wants, [after[name] for name in names])
        built.optimizer.zero_grad()
        wrong = self.differ(names, [after[name] for name in names]) or wrong
        return wrong and f"rank {self.rank}: {wrong}"

    def weights(self, built: Built, way: ZeroWay) -> dict[str, torch.Tensor]:
        """Of the whole model under its own names. A call of all ranks."""
        module = built.module if way.kind in ("none", "fsdp") else built.module.module
        if way.kind == "deepspeed" and way.stage == 3:
            import deepspeed

            with deepspeed.zero.GatheredParameters(list(module.parameters())):
                return {name: p.detach().clone() for name, p in module.named_parameters()}
        return {name: whole(p.detach()) for name, p in module.named_parameters()}

    def gradients(self, built: Built, way: ZeroWay) -> dict[str, torch.Tensor]:
        """The mean over the ranks. A call of all ranks."""
        if way.kind == "zero":
            return built.module.full_gradients()
        module = built.module if way.kind in ("none", "fsdp") else built.module.module
        if way.kind == "deepspeed":
            from deepspeed.utils import safe_get_full_grad

            return {name: safe_get_full_grad(p) for name, p in module.named_parameters()}
        return {name: whole(p.grad) for name, p in module.named_parameters() if p.grad is not None}


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def first_step_wrong(
    names: Sequence[str], before: Sequence[torch.Tensor], grads: Sequence[torch.Tensor], after: Sequence[torch.Tensor]
) -> str:
    """The first parameter that isn't where AdamW's first step ends; the bias corrections cancel its betas."""
    lr, eps, decay = SETTINGS["lr"], SETTINGS["eps"], SETTINGS["weight_decay"]
    for name, weight, grad, got in zip(names, before, grads, after, strict=True):
        want = weight.detach() * (1 - lr * decay) - lr * grad / (grad.abs() + eps)
        off = (got - want).abs().max()
        if not off <= STEP_ERROR * lr:
            return f"the first step of {name} is off by {off / lr:.3g} lr"
    return ""
