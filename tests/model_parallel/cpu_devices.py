"""Several devices on the CPU: tensors on 'cpu:0', 'cpu:1', ... that can't be mixed, as on different GPUs.

torch itself forgets the index of a CPU. Within `cpu_devices()` a tensor put on 'cpu:1' says that it is there, what is
made from it is there too, `.to` copies, and a function of tensors on two devices raises. Only numbers without dims mix.
"""

import torch
from torch.autograd.graph import _engine_run_backward
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import return_and_correct_aliasing


class OnDevice(torch.Tensor):
    @staticmethod
    def __new__(cls, inner, index):
        return torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype,
            device=torch.device("cpu"),
        )  # fmt: skip

    def __init__(self, inner, index):
        self.inner, self.index = inner, index

    @property
    def device(self):
        return torch.device("cpu", self.index)

    def __repr__(self):
        return f"{self.inner!r} on {self.device}"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        leaves = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        where = {x.device for x in leaves if x.dim() or isinstance(x, OnDevice)}
        if len(where) > 1:
            raise RuntimeError(f"{func}: expected all tensors on one device, found {sorted(map(str, where))}")
        index = next(x.index for x in leaves if isinstance(x, OnDevice))
        kwargs = {k: (torch.device("cpu") if isinstance(v, torch.device) else v) for k, v in kwargs.items()}
        out = func(*pytree.tree_map(inner_of, args), **pytree.tree_map(inner_of, kwargs))
        out = pytree.tree_map_only(torch.Tensor, lambda x: OnDevice(x, index), out)
        return return_and_correct_aliasing(func, args, kwargs, out)


def inner_of(x):
    return x.inner if isinstance(x, OnDevice) else x


class Move(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, index):
        ctx.source = x.index if isinstance(x, OnDevice) else None
        return placed(inner_of(x).clone(), index)

    @staticmethod
    def backward(ctx, grad):
        return placed(inner_of(grad).clone(), ctx.source), None


def placed(inner, index):
    return inner if index is None else OnDevice(inner, index)


def host(x):
    """As an ordinary tensor, detached."""
    return inner_of(x.detach())


class cpu_devices(TorchFunctionMode):
    """count: of devices; 'cpu' without index is the host."""

    def __init__(self, count):
        super().__init__()
        self.count = count

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        if name == "backward" and isinstance(args[0], torch.Tensor):  # what is computed again in it
            seed = torch.ones_like(args[0])
            with self:  # torch.autograd.backward would come here again
                return _engine_run_backward((args[0],), (seed,), False, False, (), True, accumulate_grad=True)
        if name == "cpu":
            name, args = "to", (args[0], "cpu")
        if name == "to":
            given = [*args[1:], *kwargs.values()]
            device = next((torch.device(d) for d in given if isinstance(d, (str, torch.device))), None)
            x = args[0]
            if device is not None and device.type == "cpu":
                self._check(device)
                x = x if x.device == device else Move.apply(x, device.index)
                dtypes = [d for d in given if isinstance(d, torch.dtype)]
                return x.to(dtypes[0]) if dtypes else x
            return func(*args, **kwargs)
        device = kwargs.get("device")
        device = torch.device(device) if isinstance(device, str) else device
        if device is None or device.type != "cpu" or device.index is None:
            return func(*args, **kwargs)
        self._check(device)
        kwargs["device"] = torch.device("cpu")
        out = func(*args, **kwargs)
        return out if isinstance(out, OnDevice) else OnDevice(out, device.index)

    def _check(self, device):
        if device.index is not None and device.index >= self.count:
            raise RuntimeError(f"there is no {device}")
