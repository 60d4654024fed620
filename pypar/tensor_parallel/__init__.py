"""Tensor parallel: the ranks of a group hold a part of each large weight and compute a part of each layer."""

from pypar.tensor_parallel.clip import clip_grad_norm_, counted_elements
from pypar.tensor_parallel.embedding import VocabParallelEmbedding
from pypar.tensor_parallel.linear import ColumnParallelLinear, RowParallelLinear
from pypar.tensor_parallel.lora import cut_adapters
from pypar.tensor_parallel.loss import VocabParallelCrossEntropy
from pypar.tensor_parallel.parallelize import check_plan, tensor_parallel
from pypar.tensor_parallel.state import (
    gather_full_grads,
    gather_full_optimizer_state,
    gather_full_state,
    load_full_optimizer_state,
)

__all__ = [
    "ColumnParallelLinear",
    "RowParallelLinear",
    "VocabParallelCrossEntropy",
    "VocabParallelEmbedding",
    "check_plan",
    "clip_grad_norm_",
    "counted_elements",
    "cut_adapters",
    "gather_full_grads",
    "gather_full_optimizer_state",
    "gather_full_state",
    "load_full_optimizer_state",
    "tensor_parallel",
]
