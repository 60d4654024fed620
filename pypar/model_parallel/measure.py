"""Costs that were measured, for placements."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from pypar.model_parallel.plan import whole_modules

ROUNDS = 3  # of which the fastest counts, behind one to warm up


@torch.no_grad()
def measure(module: nn.Module, *args: Any, no_split: Iterable[str] | None = None, **kwargs: Any) -> dict[str, float]:
    """{name of a unit: microseconds of its forward} of module(*args, **kwargs), for costs= of ModelParallel and place;
    no_split as there. The module lies on one device; it runs as in eval()."""
    spent: dict[str, float] = {}
    began: dict[str, float] = {}
    units = {name: each for name, each in whole_modules(module, no_split) if isinstance(each, nn.Module)}
    accelerator = torch.accelerator.is_available()

    def now() -> float:
        if accelerator:
            torch.accelerator.synchronize()
        return time.perf_counter() * 1e6

    def start(name: str) -> Any:
        def hook(*_: Any) -> None:
            began[name] = now()

        return hook

    def stop(name: str) -> Any:
        def hook(*_: Any) -> None:
            spent[name] = spent.get(name, 0.0) + now() - began[name]

        return hook

    modes = {each: each.training for each in module.modules()}
    handles = [each.register_forward_pre_hook(start(name)) for name, each in units.items()]
    handles += [each.register_forward_hook(stop(name)) for name, each in units.items()]
    rounds = []
    try:
        module.eval()
        for _ in range(1 + ROUNDS):
            spent.clear()
            module(*args, **kwargs)
            rounds.append({name: spent.get(name, 0.0) for name in units})
    finally:
        for handle in handles:
            handle.remove()
        for each, mode in modes.items():
            each.training = mode
    return {name: min(found[name] for found in rounds[1:]) for name in units}
