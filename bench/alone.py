"""The baseline of bench_train_tp: a rank's shard of a model, computed by plain torch with no other rank."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

import pypar
from bench.models import GPT


class _ShardLoss(pypar.VocabParallelCrossEntropy):
    """Of a vocabulary that is this shard alone. The fastest loss there is, so no advantage for the others."""

    def forward(self, input: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return super().forward(input, target % input.shape[-1])


class _ShardEmbedding(nn.Embedding):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input % self.num_embeddings)


class _Stand(torch.autograd.Function):
    """Takes the place of a gather or scatter: a tensor of its output's shape that is there already, and backward one of
    its input's shape. What is in it is of no use, but ordinary numbers."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, after: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
        ctx.before = before
        return after.detach()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return ctx.before.detach(), None, None


class _Seams:
    """Hooks that cut the sequence between attention and MLP and join it before them, without data."""

    def __init__(self, world: int):
        self.world = world
        self.tensors: dict[tuple[int, ...], torch.Tensor] = {}

    def _numbers(self, *shape: int) -> torch.Tensor:
        if shape not in self.tensors:
            self.tensors[shape] = 0.02 * torch.randn(shape)
        return self.tensors[shape]

    def _stand(self, x: torch.Tensor, length: int) -> torch.Tensor:
        return _Stand.apply(x, self._numbers(x.shape[0], length, x.shape[2]), self._numbers(*x.shape))

    def gather(self, _module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return self._stand(args[0], args[0].shape[1] * self.world), *args[1:]

    def scatter(self, _module: nn.Module, _args: Any, output: torch.Tensor) -> torch.Tensor:
        return self._stand(output, output.shape[1] // self.world)


def cut_alone(module: GPT, rank: int, world: int, group: Any, sequence: bool) -> None:
    """Leaves rank's shard of `module`, with every exchange left out. group: of this rank alone, for the loss.

    sequence: what lies between attention and MLP has 1/world of the sequence.
    """

    def cut(parent: nn.Module, name: str, dim: int) -> None:
        old: Any = getattr(parent, name)
        weight = nn.Parameter(old.weight.detach().chunk(world, dim)[rank].clone())
        new: Any = nn.Linear(1, 1, bias=False) if isinstance(old, nn.Linear) else _ShardEmbedding(1, 1)
        new.weight = weight
        if isinstance(new, nn.Embedding):
            new.num_embeddings, new.embedding_dim = weight.shape
        setattr(parent, name, new)

    cut(module, "embedding", 0)
    cut(module, "head", 0)
    for block in module.blocks:
        for name in ("q", "k", "v"):
            cut(block.attention, name, 0)
        cut(block.attention, "o", 1)
        block.attention.num_heads //= world
        cut(block.mlp, "gate", 0)
        cut(block.mlp, "up", 0)
        cut(block.mlp, "down", 1)
    module.loss = _ShardLoss(group=group)
    if sequence:
        seams = _Seams(world)
        module.embedding.register_forward_hook(seams.scatter)
        module.head.register_forward_pre_hook(seams.gather)
        for block in module.blocks:
            for part in (block.attention, block.mlp):
                part.register_forward_pre_hook(seams.gather)
                part.register_forward_hook(seams.scatter)
