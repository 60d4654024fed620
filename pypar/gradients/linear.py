"""The weight gradient of a plain nn.Linear, written by its matmul straight into the bucket: docs/design/0003."""

from __future__ import annotations

import types
from collections.abc import Iterable

import torch
import torch.nn.functional as F

from pypar.gradients.buckets import Slot, SlotRef


def fuse_all(module: torch.nn.Module, slots: Iterable[Slot]) -> None:
    """Of every plain nn.Linear inside whose weight has a slot; one whose forward is somebody else's stays as it is."""
    by_param = {id(slot.param): slot for slot in slots}
    for inner in module.modules():
        is_plain = type(inner) is torch.nn.Linear and (
            "forward" not in inner.__dict__ or "_pypar_slot" in inner.__dict__
        )
        if is_plain and id(inner.weight) in by_param:
            fuse(inner, by_param[id(inner.weight)])  # type: ignore[arg-type]


def fuse(linear: torch.nn.Linear, slot: Slot) -> None:
    """Makes the module's weight gradient go into the slot. Undone by unfuse, idle once the slot is gone."""
    linear._pypar_slot = SlotRef(slot)  # type: ignore[assignment]
    linear.forward = types.MethodType(forward, linear)  # type: ignore[method-assign]


def unfuse(linear: torch.nn.Linear) -> None:
    for name in ("forward", "_pypar_slot"):
        linear.__dict__.pop(name, None)


# Named as the method it stands for: a bound method is pickled by its name.
def forward(self: torch.nn.Linear, input: torch.Tensor) -> torch.Tensor:
    if not torch.compiler.is_compiling() and torch.is_grad_enabled():
        slot = self._pypar_slot()  # type: ignore[operator]
        if slot is not None and _eligible(slot, self.weight, input):
            return _LinearIntoSlot.apply(input, self.weight, self.bias, slot)
    return F.linear(input, self.weight, self.bias)


def _eligible(slot: Slot, weight: torch.Tensor, x: torch.Tensor) -> bool:
    return (
        weight is slot.param
        and weight.requires_grad
        and slot.bucket is not None
        and type(x) is torch.Tensor
        and x.dtype == weight.dtype
        and x.dim() >= 1
        and slot.view.is_contiguous()
        and not torch.is_autocast_enabled(x.device.type)  # the matmul runs in another dtype than the weight
        and torch._C._functorch.peek_interpreter_stack() is None
        and torch.autograd.forward_ad._current_level < 0
        and torch._C._get_tracing_state() is None
    )


class _LinearIntoSlot(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, slot):
        ctx.save_for_backward(x, weight)
        ctx.slot = slot
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, _ = ctx.needs_input_grad
        dy2 = dy.reshape(-1, dy.shape[-1])  # [M, N]
        dx = dy2.mm(weight).view(x.shape) if needs_x else None
        dweight = _weight_grad(ctx.slot, dy2, x.reshape(-1, x.shape[-1])) if needs_weight else None
        dbias = dy2.sum(0) if needs_bias else None
        return dx, dweight, dbias, None


def _weight_grad(slot: Slot, dy: torch.Tensor, x: torch.Tensor) -> torch.Tensor | None:
    """dy.T @ x: into param.grad (and None is returned, which tells autograd to add nothing), or plainly.

    Everything that adds to param.grad in one backward adds, so a weight that is used twice, or by an embedding as well,
    comes out right in any order. The accumulation node runs in either case and reports the parameter ready.
    """
    param = slot.param
    if torch.is_grad_enabled() or param._backward_hooks or param._post_accumulate_grad_hooks:
        return dy.t().mm(x)  # create_graph, or somebody wants to see the gradient
    try:
        if not torch._C._will_engine_execute_node(slot.node):
            return None  # backward(inputs=...) without this parameter
    except RuntimeError:  # autograd.grad(..., param): the gradient is returned, not accumulated
        return dy.t().mm(x)
    has_place = slot.prepare is None or slot.prepare(slot)
    grad = param.grad
    if grad is None and has_place:
        torch.mm(dy.t(), x, out=slot.view)
        param.grad = slot.view
        return None
    if grad is not None and grad.layout is torch.strided and grad.dtype == x.dtype:
        grad.addmm_(dy.t(), x)  # wherever it lies, so that its bits don't depend on that
        return None
    return dy.t().mm(x)
