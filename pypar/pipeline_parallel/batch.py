"""Batches: how they are cut into micro-batches, what the model gets of them, and how losses are weighted."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils import _pytree as pytree

IGNORED = -100
LossFn = Callable[[Any, Any], Any]


def size_of(batch: Any) -> int:
    """Samples: the length of dim 0, the same in every tensor that has dims."""
    sizes = {leaf.shape[0] for leaf in pytree.tree_leaves(batch) if isinstance(leaf, torch.Tensor) and leaf.dim()}
    if len(sizes) != 1:
        raise ValueError(f"a batch needs tensors of one length in dim 0; this one has {sorted(sizes) or 'none'}")
    return sizes.pop()


def cut_batch(batch: Any, count: int) -> list[Any]:
    """`count` micro-batches, as equal as they go, the first ones larger. Tensors without dims and what isn't a tensor
    are in each of them."""

    def part(index: int) -> Any:
        def of(leaf: Any) -> Any:
            return leaf.tensor_split(count)[index] if isinstance(leaf, torch.Tensor) and leaf.dim() else leaf

        return pytree.tree_map(of, batch)

    return [part(index) for index in range(count)]


def signature(batch: Any) -> str:
    """Shapes and dtypes, the same on every rank of a pipeline."""
    leaves, spec = pytree.tree_flatten(batch)
    kinds = [f"{leaf.dtype}{list(leaf.shape)}" if isinstance(leaf, torch.Tensor) else str(leaf) for leaf in leaves]
    return f"{kinds} {spec}"


class Caller:
    """Calls the model with what it takes of a batch: of a pair the inputs (a tuple of them as arguments, a dict as
    keywords); of a dict the keys that its forward names, without labels."""

    def __init__(self, model: nn.Module, call: Callable[..., Any] | None = None):
        """call: what is called in the model's place."""
        self.model: Callable[..., Any] = model if call is None else call
        parameters = inspect.signature(type(model).forward).parameters.values()
        self.names = {p.name for p in parameters} - {"self"}
        self.takes_all = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)

    def __call__(self, batch: Any, with_loss: bool = True) -> Any:
        if isinstance(batch, Mapping):
            known = {k: v for k, v in batch.items() if (k in self.names or self.takes_all) and k != "labels"}
            return self.model(**known)
        inputs = batch[0] if with_loss else batch
        if isinstance(inputs, Mapping):
            return self.model(**inputs)
        return self.model(*inputs) if isinstance(inputs, (tuple, list)) else self.model(inputs)


@dataclass
class Losses:
    """Of the micro-batches of one step. num_samples: of the whole batch. total: of its counts, where they are known
    before the first backward. factor: on all gradients, where they are averaged later. entropy: the sum over rows of
    the cross entropy of (logits, targets)."""

    loss_fn: LossFn | None
    num_samples: int
    total: float | None = None
    factor: float = 1.0
    entropy: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None
    value: float = 0.0  # weighted sum so far
    count: float = 0.0
    is_sum: bool = False  # loss_fn returns (sum, count)

    @classmethod
    def of(cls, batch: Any, loss_fn: LossFn | None) -> Losses:
        if not isinstance(batch, Mapping) and not (isinstance(batch, (tuple, list)) and len(batch) == 2):
            raise ValueError(f"a batch is a pair (inputs, targets) or a dict; this one is {type(batch).__name__}")
        if loss_fn is not None:
            return cls(loss_fn, size_of(batch))
        if not isinstance(batch, Mapping) or "labels" not in batch:
            raise ValueError(
                "without loss_fn a batch is a dict with 'labels' (the causal language-model loss); give one"
            )
        if not isinstance(batch["labels"], torch.Tensor):
            raise ValueError(f"batch['labels'] is {type(batch['labels']).__name__}; expected a tensor [batch, tokens]")
        return cls(None, size_of(batch), tokens_of(batch))

    def add(self, output: Any, batch: Any) -> torch.Tensor:
        """What backward starts from for this micro-batch: its share of the mean, or, of a loss_fn that returns (sum,
        count), the sum, which `scale` is to correct."""
        if self.loss_fn is None:
            loss = causal_loss(output, batch["labels"], self.entropy)
            self.count += tokens_of(batch)
            self.value += float(loss.detach())
            return loss * (self.factor / max(1.0, self.total or 0.0))
        loss = self.loss_fn(output, batch if isinstance(batch, Mapping) else batch[1])
        if isinstance(loss, (tuple, list)) and len(loss) == 2:
            self.is_sum = True
            total, count = loss
            self.count += float(count)
        else:
            total, count = loss, None
        if not isinstance(total, torch.Tensor) or total.numel() != 1:
            what = f"{list(total.shape)}" if isinstance(total, torch.Tensor) else type(total).__name__
            raise ValueError(f"loss_fn returned {what}; expected a mean without dims, or a pair (sum, count)")
        if count is not None:
            self.value += float(total.detach())
            return total
        samples = size_of(batch)
        self.count += samples
        self.value += float(total.detach()) * samples
        return total * (samples * self.factor / self.num_samples)

    @property
    def scale(self) -> float:
        """Factor on the gradients of this step."""
        return self.factor / self.count if self.is_sum and self.count else 1.0

    @property
    def mean(self) -> float:
        return self.value / self.count if self.count else 0.0


def tokens_of(batch: Mapping[str, Any]) -> float:
    """Labels that count, of the causal language-model loss."""
    return float((batch["labels"][..., 1:] != IGNORED).sum())


def causal_loss(
    output: Any, labels: torch.Tensor, entropy: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None
) -> torch.Tensor:
    """The sum over tokens of the cross entropy of the next one; labels as inputs, -100 ignored. entropy: of logits
    [N, V or a part of it] and targets [N], for logits that are cut."""
    logits = output if isinstance(output, torch.Tensor) else getattr(output, "logits", None)
    if logits is None:
        raise ValueError(f"the model returned {type(output).__name__} without logits; give a loss_fn")
    flat, targets = logits[..., :-1, :].reshape(-1, logits.shape[-1]), labels[..., 1:].reshape(-1)
    if entropy is not None:
        return entropy(flat, targets)
    wide = flat.to(torch.promote_types(flat.dtype, torch.float32))
    return F.cross_entropy(wide, targets, ignore_index=IGNORED, reduction="sum")
