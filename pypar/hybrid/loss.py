"""The cross entropy of logits that may be cut over the vocabulary."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import nn

from pypar.tensor_parallel import ColumnParallelLinear, VocabParallelCrossEntropy


def entropy_of(
    module: nn.Module, group: dist.ProcessGroup | None
) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None:
    """The sum over rows of the cross entropy of (this rank's columns of the logits, targets); -100 ignored. None where
    the module, as pypar.tensor_parallel left it, gives whole logits, or its head is not here."""
    get: Callable[[], nn.Module] | None = getattr(module, "get_output_embeddings", None)
    head = get() if get is not None else None
    if not isinstance(head, ColumnParallelLinear) or head.gather_output:
        return None
    return VocabParallelCrossEntropy(reduction="sum", group=group, sizes=head.cut.sizes())
