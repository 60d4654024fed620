"""A parameter that is not here: stage 3 between its uses."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

# Of a parameter's properties, those that are made of its values.
_VALUES = ("data", "T", "H", "mT", "mH", "real", "imag")
_METHODS = {
    torch.Tensor.__hash__,
    torch.Tensor.dim,
    torch.Tensor.element_size,
    torch.Tensor.is_complex,
    torch.Tensor.is_floating_point,
    torch.Tensor.is_inference,
    torch.Tensor.ndimension,
    torch.Tensor.nelement,
    torch.Tensor.numel,
    torch.Tensor.register_hook,
    torch.Tensor.register_post_accumulate_grad_hook,
    torch.Tensor.requires_grad_,
    torch.Tensor.size,
}


class FreedParameter(nn.Parameter):
    """Has the shape, type and gradient of the parameter, but no values: what needs them raises RuntimeError.

    A parameter becomes one, and itself again, by its __class__, as torch's uninitialized parameters do, so that it
    stays the same object for optimizers, hooks and whoever holds it.
    """

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        is_property = type(func).__name__ == "method-wrapper"
        reads_values = is_property and func.__name__ == "__get__" and func.__self__.__name__ in _VALUES
        # Autograd's node that takes the gradient is found so; within a Function, without gradients, it reads values.
        finds_node = func is torch.Tensor.view_as and args[0] is args[1] and torch.is_grad_enabled()
        if (is_property and not reads_values) or func in _METHODS or finds_node:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        freed = next(p for p in pytree.tree_leaves((args, kwargs)) if isinstance(p, FreedParameter))
        what = func.__self__.__name__ if is_property else getattr(func, "__name__", str(func))
        raise RuntimeError(
            f"pypar.Zero: {what} of '{getattr(freed, '_zero_name', 'a parameter')}', whose values are not on this "
            "rank: at stage 3 a parameter is whole only while its unit computes. Use it within "
            "`with model.full_params():`, or let the unit that uses it hold it (units=...)"
        )

    def __repr__(self) -> str:  # type: ignore[override]
        return f"FreedParameter('{getattr(self, '_zero_name', '')}', shape={tuple(self.shape)}, dtype={self.dtype})"


def free(parameter: nn.Parameter, name: str) -> None:
    """Lets go of the values, if they are there."""
    if isinstance(parameter, FreedParameter):
        return
    kept_class, shape = type(parameter), parameter.shape
    with torch.inference_mode(False):  # not a tensor of that mode, which could never be trained
        parameter.data = torch.zeros((), dtype=parameter.dtype, device=parameter.device).expand(shape)
    parameter.__dict__.update(_zero_name=name, _zero_class=kept_class)
    parameter.__class__ = FreedParameter


def restore(parameter: nn.Parameter, values: torch.Tensor) -> None:
    """Gives a parameter, freed or not, these values."""
    if isinstance(parameter, FreedParameter):
        parameter.__class__ = parameter.__dict__.pop("_zero_class")
        parameter.__dict__.pop("_zero_name")
    parameter.data = values
