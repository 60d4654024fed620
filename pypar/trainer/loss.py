"""The loss of a causal language model, whose logits may be cut over the vocabulary."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn

import pypar


class TokenLoss:
    """The sum over tokens of -log p(target), and full logits for sampling.

    module: a causal LM of transformers, as pypar.tensor_parallel left it, or full. group: of tensor parallel, or None.
    """

    def __init__(self, module: nn.Module, group: dist.ProcessGroup | None):
        head = module.get_output_embeddings()  # type: ignore[operator]
        self._group = group
        self._sizes: list[int] | None = None
        self._sum: nn.Module = nn.CrossEntropyLoss(reduction="sum")
        if isinstance(head, pypar.ColumnParallelLinear) and not head.gather_output:
            self._sizes = head.cut.sizes()
            self._sum = pypar.VocabParallelCrossEntropy(reduction="sum", group=group, sizes=self._sizes)

    def __call__(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """logits [..., V], or this rank's columns of them; targets int64 [...]; float32 [], the same on every rank"""
        rows = logits.flatten(0, -2)
        # The op of the cut loss computes in float32 whatever it gets.
        return self._sum(rows if self._sizes is not None else rows.float(), targets.flatten())

    def full(self, logits: torch.Tensor) -> torch.Tensor:
        """The logits of one token, [V], from every rank's part of them. A collective call where they are cut."""
        if self._sizes is None:
            return logits
        return pypar.ops.all_gather(logits.contiguous(), self._group, self._sizes)
