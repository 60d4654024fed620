from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from pypar.ops.gpu import loss as gpu
from pypar.ops.library import define, name_of
from pypar.reference.vocab_cross_entropy import (
    linear_vocab_cross_entropy as linear_reference,
)
from pypar.reference.vocab_cross_entropy import (
    vocab_cross_entropy as reference,
)
from pypar.reference.vocab_cross_entropy import (
    vocab_cross_entropy_dlogits as dlogits_reference,
)
from pypar.reference.vocab_cross_entropy import (
    wide_type,
)

# Rows of logits that exist at once: enough that a pass over dweight is small beside the matmul that adds to it.
CHUNK_ROWS = 512
CHUNK_ROWS_ON_GPUS = 2048  # for whom a matmul is cheaper still beside a pass over memory
# Up to here the logits are kept and backward finds the gradients: a gradient of the weight that forward makes and
# backward scales is one more pass over it, which is longer than one over few rows of logits.
FEW_ROWS = 256


def _fake(logits: torch.Tensor, target: torch.Tensor, *_: Any) -> tuple[torch.Tensor, ...]:
    wide = wide_type(logits.dtype)
    return (
        logits.new_empty((), dtype=wide),
        logits.new_empty((), dtype=wide),
        logits.new_empty(2, logits.shape[0], dtype=wide),
    )


def _linear_fake(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    sizes: list[int] | None,
    ignore_index: int,
    label_smoothing: float,
    chunk_rows: int,
    needs_dhidden: bool,
    needs_dweight: bool,
    group_name: str,
    determinism: str = "run",
) -> tuple[torch.Tensor, ...]:
    wide = wide_type(hidden.dtype)
    return (
        hidden.new_empty((), dtype=wide),
        hidden.new_empty((), dtype=wide),
        hidden.new_empty(hidden.shape[0] if needs_dhidden else 0, hidden.shape[1]),
        hidden.new_empty(weight.shape[0] if needs_dweight else 0, hidden.shape[1], dtype=wide),
    )


define(
    "vocab_cross_entropy(Tensor logits, Tensor target, SymInt[]? sizes, int ignore_index, float label_smoothing, "
    "str group_name, str determinism='run') -> (Tensor, Tensor, Tensor)",
    reference,
    _fake,
    gpu.vocab_cross_entropy,
)
define(
    "vocab_cross_entropy_dlogits(Tensor logits, Tensor target, Tensor stats, Tensor dloss, SymInt[]? sizes, "
    "int ignore_index, float label_smoothing, str group_name) -> Tensor",
    dlogits_reference,
    lambda logits, *_: torch.empty_like(logits, memory_format=torch.contiguous_format),
    gpu.vocab_cross_entropy_dlogits,
)
define(
    "linear_vocab_cross_entropy(Tensor hidden, Tensor weight, Tensor target, SymInt[]? sizes, int ignore_index, "
    "float label_smoothing, int chunk_rows, bool needs_dhidden, bool needs_dweight, str group_name, "
    "str determinism='run') -> (Tensor, Tensor, Tensor, Tensor)",
    linear_reference,
    _linear_fake,
    gpu.linear_vocab_cross_entropy,
)


class _VocabCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: torch.Tensor,
        target: torch.Tensor,
        shared: tuple[list[int] | None, int, float, str],
        determinism: str,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        loss, count, stats = torch.ops.pypar.vocab_cross_entropy(logits, target, *shared, determinism)
        ctx.save_for_backward(logits, target, stats)
        ctx.shared = shared
        ctx.mark_non_differentiable(count)
        return loss, count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        logits, target, stats = ctx.saved_tensors
        dlogits = torch.ops.pypar.vocab_cross_entropy_dlogits(logits, target, stats, grads[0], *ctx.shared)
        return dlogits, None, None, None


def _are_few(hidden: torch.Tensor, weight: torch.Tensor) -> bool:
    """What doesn't fit is left to the op, which says so."""
    fits = hidden.dim() == weight.dim() == 2 and hidden.shape[1] == weight.shape[1] and hidden.dtype == weight.dtype
    return fits and len(hidden) <= FEW_ROWS


class _FewRows(torch.autograd.Function):
    """linear_vocab_cross_entropy of logits that are kept for backward."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        target: torch.Tensor,
        shared: tuple[list[int] | None, int, float, str],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        logits = hidden @ weight.t()
        loss, count, stats = torch.ops.pypar.vocab_cross_entropy(logits, target, *shared)
        ctx.save_for_backward(hidden, weight, logits, target, stats)
        ctx.shared = shared
        ctx.mark_non_differentiable(count)
        return loss, count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        hidden, weight, logits, target, stats = ctx.saved_tensors
        dlogits = torch.ops.pypar.vocab_cross_entropy_dlogits(logits, target, stats, grads[0], *ctx.shared)
        dhidden, dweight = None, None
        if ctx.needs_input_grad[0]:
            dhidden = torch.ops.pypar.matmul_all_reduce([dlogits], [weight.t()], None, None, ctx.shared[-1])
        if ctx.needs_input_grad[1]:
            dweight = dlogits.t() @ hidden
        return dhidden, dweight, None, None


class _LinearVocabCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        target: torch.Tensor,
        shared: tuple[list[int] | None, int, float],
        chunk_rows: int,
        needs: tuple[bool, bool],
        group_name: str,
        determinism: str,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        loss, count, dhidden, dweight = torch.ops.pypar.linear_vocab_cross_entropy(
            hidden, weight, target, *shared, chunk_rows, *needs, group_name, determinism
        )
        ctx.save_for_backward(dhidden, dweight)
        ctx.needs, ctx.weight_dtype = needs, weight.dtype
        ctx.mark_non_differentiable(count)
        return loss, count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        dhidden, dweight = ctx.saved_tensors
        dloss = grads[0]
        return (
            (dhidden * dloss).to(dhidden.dtype) if ctx.needs[0] else None,
            (dweight * dloss).to(ctx.weight_dtype) if ctx.needs[1] else None,
            *[None] * 6,
        )


def vocab_cross_entropy(
    logits: torch.Tensor,
    target: torch.Tensor,
    group: dist.ProcessGroup | str | None = None,
    sizes: list[int] | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    determinism: str = "run",
) -> tuple[torch.Tensor, torch.Tensor]:
    """loss_sum = the sum over t of log(sum over v of e^x[t, v]) - x[t, target[t]], and the number of rows that count.

    Shapes         logits [T, V_r] sharded over V: rank r holds sizes[r] columns, maybe none; sizes None: as many on
                   every rank. target [T] int64, ids of the whole vocabulary, the same on every rank; loss_sum and count
                   [], float32 (float64 for float64 logits). Their quotient is the mean
    Backward       dlogits = (softmax - onehot) * dloss_sum, local, in one pass; zero where target is ignore_index.
                   Every rank must give the same dloss_sum
    Communicates   once: 3 numbers per row out of each rank (4 with label_smoothing)
    Saves          logits, target, 2 numbers per row
    Concurrency    one call at a time per group, in the same order on every rank
    Numerics       float32 inside for half types, the ranks' sums added in float64 in rank order: the same bits on every
                   rank and in every run. dlogits is rounded once. determinism "layout": the same bits for 1, 2, 4 and
                   8 ranks, too: V is cut into 8 virtual shards as torch.tensor_split cuts, whose max and sum are merged
                   in float64 along the tree ((0+1)+(2+3))+((4+5)+(6+7)), and travel so
    Raises         ValueError: shapes or dtypes that don't fit, a target outside the vocabulary, sizes that aren't whole
                   virtual shards with determinism "layout"; pypar.PeerError: ranks
                   that disagree on T, target, ignore_index or sizes, a rank that died or did not answer in time
    Source         Shoeybi et al., Megatron-LM (2019), section 3; Milakov and Gimelshein, Online normalizer calculation
                   for softmax (2018), for max and sum in one pass and how to merge them
    """
    return _VocabCrossEntropy.apply(logits, target, (sizes, ignore_index, label_smoothing, name_of(group)), determinism)


def linear_vocab_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    group: dist.ProcessGroup | str | None = None,
    sizes: list[int] | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    chunk_rows: int | None = None,
    determinism: str = "run",
) -> tuple[torch.Tensor, torch.Tensor]:
    """vocab_cross_entropy of hidden @ weight.T, of which only chunk_rows rows exist at a time.

    The loss is one number, so its gradients with respect to hidden and weight are known up to the factor dloss_sum as
    soon as the logits are. Forward makes them chunk by chunk, while the logits are at hand; backward multiplies. But
    up to 256 rows, without chunk_rows and determinism "layout", keep their logits, and backward finds the gradients.

    Shapes         hidden [T, K] and target [T] the same on every rank, weight [V_r, K] sharded over V as sizes says;
                   loss_sum and count as vocab_cross_entropy
    Backward       dhidden = the sum over ranks of dlogits @ weight, summed in forward; dweight = dlogits.T @ hidden, of
                   the own rows. Neither is made where nothing needs it, so evaluation costs one matmul
    Communicates   3 numbers per row, once per chunk; dhidden all-reduced once, T * K
    Saves          dhidden; dweight, float32 for half types. Up to 256 rows: hidden, weight, logits
    Concurrency    one call at a time per group, in the same order on every rank
    Numerics       as the unchunked form, of logits that are rounded to the dtype; dweight adds its chunks in float32,
                   is scaled there and rounded once. determinism "layout": also logits and dweight as fixed_matmul,
                   dhidden as matmul_all_reduce. Under autocast the matmuls run in autocast's dtype
    Raises         as vocab_cross_entropy; chunk_rows must be the same on every rank
    Source         gradients in forward, by chunks of rows: the fused linear cross entropy of Liger-Kernel (Hsu et al.,
                   2024). Wijmans et al., Cut Your Losses in Large-Vocabulary Language Models (2024), store no logits
                   either, and compute them again, tile by tile, in backward
    """
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    shared = (sizes, ignore_index, label_smoothing)
    if chunk_rows is None and determinism == "run" and _are_few(hidden, weight):
        return _FewRows.apply(hidden, weight, target, (*shared, name_of(group)))
    needs = torch.is_grad_enabled() and hidden.requires_grad, torch.is_grad_enabled() and weight.requires_grad
    return _LinearVocabCrossEntropy.apply(
        hidden,
        weight,
        target,
        shared,
        (CHUNK_ROWS_ON_GPUS if hidden.is_cuda else CHUNK_ROWS) if chunk_rows is None else chunk_rows,
        needs,
        name_of(group),
        determinism,
    )
