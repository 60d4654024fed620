"""Which gradient lies where: slots (one per parameter) in buckets (one flat tensor per reduction)."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from pypar import symmetric

ALIGN_BYTES = 64  # a cache line: two gradients never share one, and the matmul writes aligned rows


class SlotRef:
    """A weak reference to a slot, for attributes of modules and parameters; empty in a copy or a pickle of them."""

    def __init__(self, slot: Slot | None = None):
        self._ref = None if slot is None else weakref.ref(slot)

    def __call__(self) -> Slot | None:
        return None if self._ref is None else self._ref()

    def __reduce__(self):
        return SlotRef, ()


def place_of(param: torch.Tensor) -> torch.Tensor | None:
    """Where the first gradient of a parameter is to be written, if a reducer wants it in a certain place."""
    slot = getattr(param, "_pypar_slot", SlotRef())()
    if slot is None or slot.bucket is None or not (slot.prepare is None or slot.prepare(slot)):
        return None
    return slot.view if slot.view.is_contiguous() else None


def set_aside(param: torch.Tensor) -> torch.Tensor | None:
    """Takes param.grad away; a copy of it, where a reducer has a place for the gradients to come."""
    grad, param.grad = param.grad, None
    slot = getattr(param, "_pypar_slot", SlotRef())()
    return grad if grad is None or slot is None else grad.clone()


class Slot:
    """One parameter's place in a bucket."""

    __slots__ = (
        "__weakref__",
        "bucket",
        "expected",
        "fires",
        "index",
        "name",
        "node",
        "param",
        "prepare",
        "ptr",
        "used",
        "view",
    )

    def __init__(self, index: int, name: str, param: torch.nn.Parameter):
        self.index = index
        self.name = name
        self.param = param
        # Held, because autograd itself keeps only a weak reference and its hooks would vanish with it.
        self.node: Any = torch.autograd.graph.get_gradient_edge(param).node
        self.bucket: Bucket | None = None  # None: left out, because a static graph never uses the parameter
        self.view: torch.Tensor = torch.empty(0)
        # Called before a gradient is produced in `view`, which may not be there all the time: whether it is now.
        self.prepare: Callable[[Slot], bool] | None = None
        self.ptr = 0
        self.expected = 1  # how often the gradient arrives in one backward; a static graph learns it
        self.fires = 0  # how often it has arrived in this backward
        self.used = False  # whether it has arrived since the last reduction, no_sync() included
        param._pypar_slot = SlotRef(self)  # type: ignore[attr-defined]

    def place(self, bucket: Bucket, view: torch.Tensor) -> None:
        """Moves to another bucket; a gradient that lies in the old one moves along."""
        old = self.view
        grad = self.param.grad
        if grad is not None and self.bucket is not None and grad.data_ptr() == self.ptr:
            view.copy_(old)
            self.param.grad = view
        self.bucket, self.view, self.ptr = bucket, view, view.data_ptr()

    def take(self, grad: torch.Tensor) -> None:
        """Copies a gradient that lies elsewhere into the bucket, where it stays."""
        if grad.layout is not torch.strided:
            raise ValueError(
                f"pypar.DataParallel: the gradient of '{self.name}' is {grad.layout}, and only dense gradients are "
                "reduced; build the embedding with sparse=False"
            )
        self.view.copy_(grad)
        self.param.grad = self.view

    def is_home(self, grad: torch.Tensor) -> bool:
        return grad is self.view or (grad.data_ptr() == self.ptr and grad.shape == self.view.shape)


class Bucket:
    """A flat tensor of gradients that is reduced at once. Has the methods of torch.distributed.GradBucket."""

    def __init__(self, index: int, is_last: bool, slots: Sequence[Slot], group: dist.ProcessGroup):
        self.slots = list(slots)
        self.pending = len(self.slots)
        self.work: Any = None
        self.scratch: torch.Tensor | None = None
        self._index, self._is_last = index, is_last
        first = self.slots[0].param
        align = max(1, ALIGN_BYTES // first.element_size())
        offsets, numel = [], 0
        for slot in self.slots:
            offsets.append(numel)
            numel += -(-slot.param.numel() // align) * align
        self.flat = symmetric.empty(numel, first.dtype, group, first.device)
        self.flat.zero_()  # the padding is reduced too
        for slot, offset in zip(self.slots, offsets, strict=True):
            slot.place(self, _like(self.flat[offset : offset + slot.param.numel()], slot.param))

    @property
    def label(self) -> str:
        names = [slot.name for slot in self.slots]
        return f"'{names[0]}'" if len(names) == 1 else f"'{names[0]}' to '{names[-1]}'"

    def index(self) -> int:
        return self._index

    def buffer(self) -> torch.Tensor:
        return self.flat

    def set_buffer(self, tensor: torch.Tensor) -> None:
        self.flat.copy_(tensor)

    def gradients(self) -> list[torch.Tensor]:
        return [slot.view for slot in self.slots]

    def parameters(self) -> list[torch.Tensor]:
        return [slot.param for slot in self.slots]

    def is_last(self) -> bool:
        return self._is_last


def _like(flat: torch.Tensor, param: torch.Tensor) -> torch.Tensor:
    """flat in the parameter's shape and, if it is dense, in its strides, as autograd expects."""
    if torch.ops.aten.is_non_overlapping_and_dense(param):
        return flat.as_strided(param.size(), param.stride())
    return flat.view(param.size())


def assign(slots: Sequence[Slot], first_bytes: int, bucket_bytes: int) -> list[list[Slot]]:
    """Cuts slots, in order of readiness, into buckets of one dtype and device each; ordered by when they fill up."""
    open_buckets: dict[tuple[torch.dtype, torch.device], list[Slot]] = {}
    sizes: dict[tuple[torch.dtype, torch.device], int] = {}
    done: list[list[Slot]] = []
    for slot in slots:
        key = (slot.param.dtype, slot.param.device)
        bucket = open_buckets.setdefault(key, [])
        bucket.append(slot)
        sizes[key] = sizes.get(key, 0) + slot.param.numel() * slot.param.element_size()
        if sizes[key] >= (bucket_bytes if done else first_bytes):
            done.append(open_buckets.pop(key))
            del sizes[key]
    position = {id(slot): n for n, slot in enumerate(slots)}
    return done + sorted(open_buckets.values(), key=lambda bucket: position[id(bucket[-1])])
