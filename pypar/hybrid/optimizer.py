"""The optimizer of a shared-out model: one of torch's over what is here, or ZeRO's, and the norm over all ranks."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from pypar.zero.optimizer import ELEMENTWISE, OptimizerAround

if TYPE_CHECKING:
    from pypar.hybrid.model import HybridModel


class HybridOptimizer(OptimizerAround):
    """What pypar.parallelize returns: param_groups, state and defaults are those of `inner`, so that schedulers work.

    inner: a torch optimizer over this rank's parameters, or with ZeRO over its pieces (pypar.zero.ShardedOptimizer).
    """

    def __init__(self, model: HybridModel, inner: torch.optim.Optimizer):
        self.model, self.inner = model, inner

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Collective with ZeRO, which leaves a step out, on every rank, where a gradient on any is not finite."""
        return self.model.guarded(lambda: self.inner.step(closure))

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forgets the gradients of all parameters, those that no group has as well."""
        self.inner.zero_grad(set_to_none)
        self.model.forget_gradients()

    @torch.no_grad()
    def clip_grad_norm_(self, max_norm: float) -> float:
        """Scales all gradients so that their norm over every axis is at most max_norm, each element of the full model
        counted once (tied weights, copies of key and value heads); returns what it was, the same on every rank.
        Collective of all ranks."""
        return self.model.guarded(lambda: self._clip(max_norm))

    def _clip(self, max_norm: float) -> float:
        norm = self.model.gradient_norm()
        factor = max_norm / (norm + 1e-6)
        if math.isfinite(norm) and factor < 1:
            self.model.scale_gradients(factor)
        return norm

    def state_dict(self) -> dict[str, Any]:  # type: ignore[override]
        """Of this rank's part, for the same plan; pypar.save keeps all of it, for any."""
        return self.inner.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.inner.load_state_dict(state_dict)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        raise RuntimeError("pypar.parallelize: parameters are shared out already; give it param_groups= instead")

    def __repr__(self) -> str:
        return f"HybridOptimizer({self.inner!r})"


def check_elementwise(kind: Any, tp: int) -> None:
    """Raises ValueError for an optimizer that would step parts of a parameter wrongly."""
    name = getattr(kind, "__name__", "")
    if tp > 1 and isinstance(kind, type) and name not in ELEMENTWISE:
        raise ValueError(
            f"pypar.parallelize: {name} is not known to work element by element, so that with tp={tp} a rank's part of "
            f"a weight would be stepped wrongly; use one of {', '.join(ELEMENTWISE)}"
        )
