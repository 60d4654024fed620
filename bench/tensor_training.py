"""The ways of bench_train_tp: how the ranks of tensor parallel share a model, and what makes a way right."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    loss_parallel,
    parallelize_module,
)
from torch.utils.flop_counter import FlopCounterMode

import pypar
from bench.alone import cut_alone
from bench.harness import Case
from bench.models import CONFIGS, GPT, GPTConfig
from bench.steps import ERROR, Built, StepRank, first_wrong, model_of
from pypar.tensor_parallel import gather_full_grads, gather_full_state

BATCH = {"tiny": 2, "small": 4, "large": 3}  # sequences, the same on every rank


@dataclass(frozen=True)
class Way:
    """How the ranks share a model. kind: none (each computes its shard alone), dtensor (torch) or tp (pypar)."""

    kind: str
    backend: str = ""
    sequence: bool = False


WAYS = {
    "none": Way("none"),
    "none-sp": Way("none", sequence=True),
    "dtensor-gloo": Way("dtensor", "gloo"),
    "dtensor-pypar": Way("dtensor", "pypar"),
    "dtensor-sp-gloo": Way("dtensor", "gloo", sequence=True),
    "dtensor-sp-pypar": Way("dtensor", "pypar", sequence=True),
    "tp-pypar": Way("tp", "pypar"),
    "tp-sp-pypar": Way("tp", "pypar", sequence=True),
}


def tokens_per_step(case: Case) -> int:
    return BATCH[model_of(case)] * CONFIGS[model_of(case)].seq_len


def parallelize_with_torch(module: GPT, group: Any, sequence: bool) -> None:
    """As torchtitan does for a Llama: vocabulary-parallel embedding and head, loss_parallel around the step. group: a
    process group, or a mesh of one dim."""
    mesh = group if isinstance(group, DeviceMesh) else DeviceMesh.from_group(group, "cpu")
    seam = Shard(1) if sequence else Replicate()  # of the tensors between attention and MLP
    norm = {"norm1": SequenceParallel(), "norm2": SequenceParallel()} if sequence else {}
    plan = {
        "embedding": RowwiseParallel(input_layouts=Replicate(), output_layouts=seam),
        "head": ColwiseParallel(input_layouts=seam, output_layouts=Shard(-1), use_local_output=False),
    } | ({"norm": SequenceParallel()} if sequence else {})
    parallelize_module(module, mesh, plan)
    for block in module.blocks:
        column = {f"attention.{name}": ColwiseParallel() for name in "qkv"}
        column |= {f"mlp.{name}": ColwiseParallel() for name in ("gate", "up")}
        row = {name: RowwiseParallel(output_layouts=seam) for name in ("attention.o", "mlp.down")}
        inputs = {  # one gather, or one all_reduce of the gradient, for all that read the tensor
            "attention": PrepareModuleInput(
                input_layouts=(seam, None, None), desired_input_layouts=(Replicate(), None, None)
            ),
            "mlp": PrepareModuleInput(input_layouts=seam, desired_input_layouts=Replicate()),
        }
        parallelize_module(block, mesh, norm | inputs | column | row)
        block.attention.num_heads //= mesh.size()


def optimizer_of(module: nn.Module) -> torch.optim.Optimizer:
    """The fused kernel takes DTensors or tensors, no mixture."""
    params = list(module.parameters())
    kinds = [[p for p in params if isinstance(p, DTensor) is is_dtensor] for is_dtensor in (True, False)]
    return torch.optim.AdamW([{"params": of_kind} for of_kind in kinds if of_kind], lr=1e-4, fused=True)


class TensorRank(StepRank):
    """Ranks that all feed the whole batch and hold a shard of the model each."""

    def __init__(self, *args: Any):
        super().__init__(*args)
        backend = "pypar" if "pypar" in dist.Backend.backend_list else "gloo"
        self.alone = dist.new_subgroups(1, backend=backend)[0]

    def num_sequences(self, model: str) -> int:
        return BATCH[model]

    def share_of(self, data: torch.Tensor) -> torch.Tensor:
        return data

    def build(self, way: Way, config: GPTConfig) -> Built:
        module = GPT(config)
        if way.kind == "dtensor":
            parallelize_with_torch(module, self.groups[way.backend], way.sequence)
            return Built(module, optimizer_of(module), loss_parallel)
        if way.kind == "tp":
            group = self.groups[way.backend]
            pypar.tensor_parallel(module, group, sequence_parallel=way.sequence, loss_parallel=True)
            module.loss = pypar.VocabParallelCrossEntropy(group=group)
        else:
            cut_alone(module, self.rank, self.world, self.alone, way.sequence)
        return Built(module, optimizer_of(module))

    def verify(self, variant: str, case: Case) -> str:
        """Loss and every gradient, gathered, against one process with the same weights, gathered too; the weights that
        come out are the same on every rank. A baseline: as many matmul operations as one of W shares of the model."""
        built, way = self.of(variant, case), self.ways[variant]
        wrong = self._verify_alone(built, case) if way.kind == "none" else self._verify_together(built, way, case)
        built.module.zero_grad()
        return wrong and f"rank {self.rank}: {wrong}"

    def _verify_together(self, built: Built, way: Way, case: Case) -> str:
        plain = GPT(CONFIGS[model_of(case)])
        names, params = zip(*plain.named_parameters(), strict=True)
        plain.load_state_dict(full_state(built.module, way))
        expected = plain(self.data[:, :-1], self.data[:, 1:])
        wants = torch.autograd.grad(expected, params)
        loss = self.learn(built).detach()
        loss = loss.full_tensor() if isinstance(loss, DTensor) else loss
        grads = full_grads(built.module, way)
        wrong = first_wrong(names, [grads.get(name) for name in names], wants)
        if not abs(loss - expected) <= ERROR * abs(expected):
            wrong = f"the loss is {loss:g}, expected {expected:g}"
        return self.differ(names, params) or wrong

    def _verify_alone(self, built: Built, case: Case) -> str:
        plain = GPT(CONFIGS[model_of(case)])
        with FlopCounterMode(display=False) as whole:
            plain(self.data[:, :-1], self.data[:, 1:]).backward()
        with FlopCounterMode(display=False) as shard:
            self.learn(built)
        if shard.get_total_flops() * self.world != whole.get_total_flops():
            return f"{shard.get_total_flops()} operations, {self.world} such shares aren't {whole.get_total_flops()}"
        for name, param in built.module.named_parameters():
            if param.grad is None or not param.grad.isfinite().all():
                return f"{name} has no finite gradient"
        return ""


def full_state(module: nn.Module, way: Way) -> dict[str, torch.Tensor]:
    """The weights of the whole model under its own names. A call of all ranks."""
    if way.kind == "tp":
        return gather_full_state(module)
    return {name: whole(tensor) for name, tensor in module.state_dict().items()}


def full_grads(module: nn.Module, way: Way) -> dict[str, torch.Tensor]:
    if way.kind == "tp":
        return gather_full_grads(module)
    return {name: whole(param.grad) for name, param in module.named_parameters() if param.grad is not None}


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
