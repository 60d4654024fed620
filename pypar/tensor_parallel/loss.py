"""The loss over logits that are cut over the vocabulary."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from pypar import ops
from pypar.tensor_parallel.linear import ColumnParallelLinear
from pypar.tensor_parallel.shards import Group, Place, place_of
from pypar.tensor_parallel.targets import Target


class VocabParallelCrossEntropy(nn.Module):
    """nn.CrossEntropyLoss of logits of which each rank holds a range of the classes; the loss is full.

    weight           None: weights of classes are refused
    ignore_index, reduction, label_smoothing
                     as nn.CrossEntropyLoss's; reduction "mean" (over the targets that count) or "sum"
    group            the ranks that share the classes (default: all)
    sizes            classes per rank, as ColumnParallelLinear.cut.sizes() says; None: as many on every rank
    determinism      "run", or "layout": the same bits for 1, 2, 4 and 8 ranks; default that of the group's Place
    Shapes           input [T, V_r] or [V_r], target int64 [T] or [], ids of all classes, the same on every rank
    Backward         local; every rank must go on with the same loss
    Numerics, Raises those of pypar.ops.vocab_cross_entropy
    """

    def __init__(
        self,
        weight: None = None,
        ignore_index: int = -100,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        group: Group | Place = None,
        sizes: Sequence[int] | None = None,
        determinism: str | None = None,
    ):
        super().__init__()
        if weight is not None:
            raise ValueError("VocabParallelCrossEntropy takes no weights of classes: leave out weight")
        if reduction not in ("mean", "sum"):
            raise ValueError(f"reduction={reduction!r}: VocabParallelCrossEntropy gives the 'mean' or the 'sum'")
        self.ignore_index, self.reduction, self.label_smoothing = ignore_index, reduction, label_smoothing
        self.place = place_of(group, determinism)
        self.sizes = list(sizes) if sizes is not None else None

    @classmethod
    def from_loss(
        cls,
        loss: nn.CrossEntropyLoss,
        group: Group | Place = None,
        sizes: Sequence[int] | None = None,
        determinism: str | None = None,
    ) -> VocabParallelCrossEntropy:
        """With the settings of `loss`."""
        given: Any = loss.weight
        return cls(given, loss.ignore_index, loss.reduction, loss.label_smoothing, group, sizes, determinism)

    def forward(self, input: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        if input.dim() not in (1, 2) or target.shape != input.shape[:-1]:
            raise ValueError(
                f"VocabParallelCrossEntropy: input {tuple(input.shape)} and target {tuple(target.shape)}; it takes "
                "[T, classes of this rank] and [T]: flatten what comes before the classes"
            )
        rows = input if input.dim() == 2 else input[None]
        loss, count = ops.vocab_cross_entropy(
            rows,
            target.reshape(-1),
            self.place.group_name,
            self.sizes,
            self.ignore_index,
            self.label_smoothing,
            self.place.determinism,
        )
        return loss if self.reduction == "sum" else loss / count

    def extra_repr(self) -> str:
        return f"rank {self.place.rank} of {self.place.world_size} holds {self.sizes or 'as many as every other'}"


def loss_head(module: nn.Module, targets: list[Target]) -> str:
    """The name of the linear that makes the logits. Raises ValueError where the plan cuts none."""
    columns = [t.name for t in targets if t.style.kind == "column" and t.dim is None]
    end = getattr(module, "get_output_embeddings", lambda: None)()
    named = [n for n in columns if module.get_submodule(n) is end]
    own = [n for n in columns if "." not in n]
    if not named and len(own) != 1:
        raise ValueError(
            f"loss_parallel=True: the plan cuts no output layer of {type(module).__name__} ({', '.join(own) or 'none'} "
            "of its own linears); name it 'colwise_gather_output', or use loss_parallel=False"
        )
    return (named or own)[0]


def use_loss_parallel(module: nn.Module, head: str) -> None:
    """The head keeps its columns to itself; a Hugging Face model's loss takes them."""
    layer = module.get_submodule(head)
    assert isinstance(layer, ColumnParallelLinear)
    layer.gather_output = False
    if hasattr(type(module), "loss_function"):
        module.loss_function = _CausalLoss(layer.place, layer.cut.sizes())  # type: ignore[assignment]


class _CausalLoss:
    """What Hugging Face's causal language models call with their logits, here [B, S, V_r]."""

    def __init__(self, place: Place, sizes: list[int]):
        self.place, self.sizes = place, sizes

    def __call__(
        self,
        logits: torch.Tensor,
        labels: torch.Tensor,
        vocab_size: int,
        num_items_in_batch: Any = None,
        ignore_index: int = -100,
        shift_labels: torch.Tensor | None = None,
        **_: Any,
    ) -> torch.Tensor:
        if shift_labels is None:  # position t predicts label t + 1
            shift_labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
        loss, count = ops.vocab_cross_entropy(
            logits.reshape(-1, logits.shape[-1]),
            shift_labels.reshape(-1).to(logits.device),
            self.place.group_name,
            self.sizes,
            ignore_index,
            determinism=self.place.determinism,
        )
        return loss / (count if num_items_in_batch is None else num_items_in_batch)
