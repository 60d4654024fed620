"""Generation with a model whose forward goes through a pipeline."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn


def generate(
    module: nn.Module, forward: Callable[..., Any], agree: Callable[[], int], *args: Any, **kwargs: Any
) -> Any:
    """module.generate(*args, **kwargs) of a Hugging Face model, whose forward is `forward`, without a cache. agree: a
    seed that is the same on every rank. Raises ValueError for a model that has no generate()."""
    if not hasattr(module, "generate"):
        raise ValueError(f"pypar.Pipeline: {type(module).__name__} has no generate()")
    model: Any = module
    original = model.forward
    training = model.training

    def step(*inner: Any, **named: Any) -> Any:
        model.forward = original
        try:
            return forward(*inner, **named)
        finally:
            model.forward = step

    model.forward = step
    try:
        model.eval()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(agree())
            return model.generate(*args, **{**kwargs, "use_cache": False})
    finally:
        model.__dict__.pop("forward", None)
        model.train(training)
