"""The loss over a sharded vocabulary, of CUDA tensors: triton_kernels where all ranks reach each other's memory.

The reference, over the process group, elsewhere: for float64 logits, without Triton, and for determinism "layout".
"""

from __future__ import annotations

import torch

from pypar.ops.gpu.run import channel_for, peers_of, triton_kernels, where
from pypar.reference.collectives import is_layout, size_of
from pypar.reference.vocab_cross_entropy import own_columns
from pypar.reference.vocab_cross_entropy import vocab_cross_entropy as reference
from pypar.reference.vocab_cross_entropy import vocab_cross_entropy_dlogits as dlogits_reference

FUSED = (torch.float32, torch.bfloat16, torch.float16)


def _shard(
    logits: torch.Tensor, target: torch.Tensor, sizes: list[int] | None, ignore_index: int, group_name: str
) -> tuple[int, int]:
    """(first column of this rank, columns of all). Raises ValueError where sizes don't fit or a target lies outside.

    To look at the targets takes a wait for the GPU, which is not allowed while a graph is captured; there, and in its
    replays, such a target makes the loss NaN.
    """
    capturing = logits.is_cuda and torch.cuda.is_current_stream_capturing()
    columns = logits.shape[1]
    own = own_columns(columns, target[:0] if capturing else target, sizes, ignore_index, group_name)
    return own.start, sum(sizes) if sizes is not None else columns * size_of(group_name)


def vocab_cross_entropy(
    logits: torch.Tensor,
    target: torch.Tensor,
    sizes: list[int] | None,
    ignore_index: int,
    label_smoothing: float,
    group_name: str,
    determinism: str = "run",
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    group, kernels = peers_of(logits, group_name), triton_kernels("vocab_cross_entropy")
    if is_layout(determinism) or group is None or kernels is None or logits.dtype not in FUSED:
        return reference(logits, target, sizes, ignore_index, label_smoothing, group_name, determinism)
    begin, vocabulary = _shard(logits, target, sizes, ignore_index, group_name)
    slot = kernels.vocab_cross_entropy_bytes(len(target), group.size(), label_smoothing)
    with channel_for(group, "vocab_cross_entropy", slot, logits.device) as channel:
        results = kernels.vocab_cross_entropy(
            logits, target, **where(channel), begin=begin, vocabulary=vocabulary, ignore_index=ignore_index,
            label_smoothing=label_smoothing,
        )  # fmt: skip
        channel.after()
    return results


def vocab_cross_entropy_dlogits(
    logits: torch.Tensor,
    target: torch.Tensor,
    stats: torch.Tensor,
    dloss: torch.Tensor,
    sizes: list[int] | None,
    ignore_index: int,
    label_smoothing: float,
    group_name: str,
) -> torch.Tensor:
    """Exchanges nothing, so that only Triton and the dtype decide."""
    kernels = triton_kernels("vocab_cross_entropy")
    if kernels is None or logits.dtype not in FUSED or stats.dtype != torch.float32:
        return dlogits_reference(logits, target, stats, dloss, sizes, ignore_index, label_smoothing, group_name)
    begin, vocabulary = _shard(logits, target, sizes, ignore_index, group_name)
    return kernels.vocab_cross_entropy_dlogits(
        logits, target, stats, dloss, begin, vocabulary, ignore_index, label_smoothing
    )
