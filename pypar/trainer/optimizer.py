"""AdamW over two parameter groups, and the learning rate of each step."""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from pypar.trainer.config import TrainConfig


def groups_of(named: list[tuple[str, nn.Parameter]], config: TrainConfig) -> list[dict[str, Any]]:
    """Weight decay on matrices and embeddings; not on norms and biases, which have one dimension. Two groups, on every
    rank."""
    return [
        {"params": [p for _, p in named if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for _, p in named if p.ndim < 2], "weight_decay": 0.0},
    ]


def settings_of(config: TrainConfig) -> dict[str, Any]:
    """Of AdamW. fused: one pass over each parameter instead of a dozen."""
    return {"lr": config.lr, "betas": (config.beta1, config.beta2), "eps": config.eps, "fused": True}


def learning_rate(step: int, config: TrainConfig) -> float:
    """Of step 0 .. steps - 1: linear up to lr over `warmup` steps, then a cosine down to lr * min_lr_ratio."""
    warmup = min(config.warmup, config.steps)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    done = (step - warmup) / max(1, config.steps - warmup)
    low = config.min_lr_ratio
    return config.lr * (low + (1.0 - low) * 0.5 * (1.0 + math.cos(math.pi * min(1.0, done))))
