from __future__ import annotations

import math

import torch


def zero_step(
    param: torch.Tensor,
    grad: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    max_exp_avg_sq: torch.Tensor | None,
    low: torch.Tensor | None,
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    grad_scale: float,
    decoupled: bool,
    maximize: bool,
) -> None:
    grad = grad * (-grad_scale if maximize else grad_scale)
    weight = param * (1 - lr * weight_decay) if decoupled else param
    if not decoupled:
        grad = grad + param * weight_decay
    exp_avg.add_((grad - exp_avg) * (1 - beta1))
    exp_avg_sq.mul_(beta2).add_(grad * grad * (1 - beta2))
    second = exp_avg_sq
    if max_exp_avg_sq is not None:
        second = max_exp_avg_sq.copy_(torch.maximum(max_exp_avg_sq, exp_avg_sq))
    denominator = second.sqrt() / math.sqrt(1 - beta2**step) + eps
    param.copy_(weight - exp_avg / denominator * (lr / (1 - beta1**step)))
    if low is not None:
        low.copy_(param)
