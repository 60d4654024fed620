from __future__ import annotations

from typing import Any

import torch

from pypar.ops.gpu import zero as gpu
from pypar.ops.library import define
from pypar.reference.zero_step import zero_step as reference


def _fake(*_: Any) -> None:
    return None


define(
    "zero_step(Tensor(a!) param, Tensor grad, Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq, Tensor(d!)? max_exp_avg_sq, "
    "Tensor(e!)? low, int step, float lr, float beta1, float beta2, float eps, float weight_decay, float grad_scale, "
    "bool decoupled, bool maximize) -> ()",
    reference,
    _fake,
    gpu.zero_step,
)


def zero_step(
    param: torch.Tensor,
    grad: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    step: int,
    *,
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
    max_exp_avg_sq: torch.Tensor | None = None,
    low: torch.Tensor | None = None,
    grad_scale: float = 1.0,
    decoupled: bool = True,
    maximize: bool = False,
) -> None:
    """AdamW on a shard: unscale, clip, moments, weight decay, new weights and their rounded copy in one pass.

    Shapes         param, grad, exp_avg, exp_avg_sq, max_exp_avg_sq float32, all of the same number of elements and
                   contiguous; low bfloat16 or float16, likewise: the weights that computing uses
    step           of this update, from 1, for the bias corrections
    grad_scale     factor on the gradient: one over the loss scale, times what clipping wants
    max_exp_avg_sq amsgrad's running maximum; None: not amsgrad
    decoupled      False: weight decay goes into the gradient (Adam)
    Communicates   nothing; where param is memory that the ranks share, writing it is publishing it
    Numerics       the order of operations of torch.optim.AdamW, without multiply-add: the same bits on every
                   instruction set. low is rounded once, to nearest even
    Raises         ValueError: tensors of another type, size or layout, step below 1
    Source         Loshchilov and Hutter, Decoupled Weight Decay Regularization (2019)
    """
    torch.ops.pypar.zero_step(
        param, grad, exp_avg, exp_avg_sq, max_exp_avg_sq, low, step, lr, betas[0], betas[1], eps, weight_decay,
        grad_scale, decoupled, maximize,
    )  # fmt: skip
