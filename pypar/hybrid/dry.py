"""A training step of one plan with neither ranks nor values: what it allocates, and what the ranks would send."""

from __future__ import annotations

import copy
import itertools
import pickle
import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from pypar.pipeline_parallel.batch import Losses, causal_loss

_names = itertools.count()


class DryLosses(Losses):
    """The loss without its value."""

    def add(self, output: Any, batch: Any) -> torch.Tensor:
        if self.loss_fn is None:
            return causal_loss(output, batch["labels"], self.entropy) * self.factor
        loss = self.loss_fn(output, batch if isinstance(batch, dict) else batch[1])
        if isinstance(loss, (tuple, list)) and len(loss) == 2:
            return loss[0]
        if not isinstance(loss, torch.Tensor) or loss.numel() != 1:
            raise ValueError(f"loss_fn returned {type(loss).__name__}; expected a mean, or a pair (sum, count)")
        return loss * self.factor


@contextmanager
def stand_in(rank: int, size: int) -> Iterator[dist.ProcessGroup]:
    """A group of which this is one rank, and the others aren't there: it has a name and a size."""
    from torch._C._distributed_c10d import FakeProcessGroup, _register_process_group, _unregister_process_group

    made: Any = dist.ProcessGroup
    group = made(rank, size)
    group._register_backend(
        torch.device("cpu"), dist.ProcessGroup.BackendType.CUSTOM, FakeProcessGroup._create_internal(rank, size)
    )
    name = dist.GroupName(f"pypar.estimate.{next(_names)}")
    group._set_group_name(name)
    _register_process_group(name, group)
    try:
        yield group
    finally:
        _unregister_process_group(name)


def without_values(module: nn.Module, mode: FakeTensorMode, dtype: torch.dtype | None = None) -> nn.Module:
    """A copy of the module whose tensors have shapes and types alone, on the CPU; tied ones stay tied. dtype: of
    floating parameters; None: their own."""
    memo: dict[int, Any] = {}
    with mode:
        for tensor in [*module.parameters(), *module.buffers()]:
            if id(tensor) in memo:
                continue
            is_parameter = isinstance(tensor, nn.Parameter)
            kind = dtype if dtype is not None and is_parameter and tensor.is_floating_point() else tensor.dtype
            made = torch.empty_strided(tensor.shape, tensor.stride(), dtype=kind, device="cpu")
            memo[id(tensor)] = nn.Parameter(made, tensor.requires_grad) if is_parameter else made
    copied: nn.Module = copy.deepcopy(module, memo)
    return copied


@contextmanager
def one_sequence_per_row() -> Iterator[None]:
    """Hugging Face's models look at the values of their positions for sequences that are packed into one row, and
    where there are no values make the masks that those would need, of which attention then keeps copies. Here there
    are none such."""
    masks: Any = sys.modules.get("transformers.masking_utils")
    finds = getattr(masks, "find_packed_sequence_indices", None)
    if finds is None:
        yield
        return
    masks.find_packed_sequence_indices = lambda position_ids: None
    try:
        yield
    finally:
        masks.find_packed_sequence_indices = finds


class Live(TorchDispatchMode):
    """Bytes of the tensors that come to be in the block and are there still, and the most at a time.

    kept: tensors that were there before, which don't count, nor do their views. Gradients of `parameters` count by
    themselves: gradients, and gradients_at_peak.
    """

    def __init__(self, kept: Sequence[torch.Tensor], parameters: Sequence[nn.Parameter]):
        super().__init__()
        self.now = self.peak = self.gradients = self.gradients_at_peak = 0
        self._known: dict[int, int] = {}  # storage -> bytes that count
        self._is_gradient: set[int] = set()
        self._hidden = False
        self._kept = list(kept)
        self.parameters = list(parameters)
        for tensor in kept:
            self._known[tensor.untyped_storage()._cdata] = 0
        this = weakref.ref(self)
        for parameter in parameters:
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(_claiming(this))

    @contextmanager
    def hiding(self) -> Iterator[None]:
        """What is made in here is memory that counts elsewhere."""
        before, self._hidden = self._hidden, True
        try:
            yield
        finally:
            self._hidden = before

    def claim(self) -> None:
        """Gradients that came by other ways than autograd's."""
        for parameter in self.parameters:
            self._claim(parameter)

    def _claim(self, parameter: torch.Tensor) -> None:
        for grad in (parameter.grad, getattr(parameter, "_pypar_second_grad", None)):
            if grad is not None:
                key = grad.untyped_storage()._cdata
                if self._known.get(key) and key not in self._is_gradient:
                    self._is_gradient.add(key)
                    self.gradients += self._known[key]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in pytree.tree_leaves(out):
            if isinstance(x, torch.Tensor) and x.device.type != "meta":
                self._see(x)
        return out

    def _see(self, x: torch.Tensor) -> None:
        storage = x.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        self._known[key] = 0 if self._hidden else storage.nbytes()
        self.now += self._known[key]
        if self.now > self.peak:
            self.peak, self.gradients_at_peak = self.now, self.gradients
        weakref.finalize(storage, self._gone, key).atexit = False

    def _gone(self, key: int) -> None:
        num_bytes = self._known.pop(key, 0)
        self.now -= num_bytes
        if key in self._is_gradient:
            self._is_gradient.discard(key)
            self.gradients -= num_bytes


def _claiming(this: weakref.ref[Live]) -> Callable[[torch.Tensor], None]:
    def hook(parameter: torch.Tensor) -> None:
        live = this()
        if live is not None:
            live._claim(parameter)

    return hook


@dataclass
class Message:
    leaves: list[Any]
    spec: Any


@dataclass
class DryChannel:
    """Of an edge between two stages: what is sent comes back as new tensors, in memory of the ring."""

    receiver: Live | None = None  # where memory is made for what comes
    messages: dict[int, Message] = field(default_factory=dict)
    sent_bytes: int = 0
    most_bytes: int = 0

    def send(self, payload: Any, tag: int) -> None:
        leaves, spec = pytree.tree_flatten(payload)
        tensors = [x for x in leaves if isinstance(x, torch.Tensor)]
        kinds = [x.requires_grad if isinstance(x, torch.Tensor) else (x,) for x in leaves]
        text = len(pickle.dumps((kinds, pytree.treespec_dumps(spec))))
        sizes = [*(x.numel() * x.dtype.itemsize for x in tensors), text]
        self.sent_bytes += sum(sizes[:-1])
        self.most_bytes = max(self.most_bytes, sum(64 + -(-size // 64) * 64 for size in sizes))
        plain = [(x.shape, x.dtype, x.requires_grad) if isinstance(x, torch.Tensor) else x for x in leaves]
        self.messages[tag] = Message(
            [_Shape(*p) if isinstance(x, torch.Tensor) else p for x, p in zip(leaves, plain, strict=True)], spec
        )

    def recv(self, tag: int) -> Any:
        message = self.messages.pop(tag)
        assert self.receiver is not None
        with self.receiver.hiding():
            leaves = [x.empty() if isinstance(x, _Shape) else x for x in message.leaves]
        return pytree.tree_unflatten(leaves, message.spec)


@dataclass
class _Shape:
    shape: torch.Size
    dtype: torch.dtype
    requires_grad: bool

    def empty(self) -> torch.Tensor:
        return torch.empty(self.shape, dtype=self.dtype).requires_grad_(self.requires_grad)


def quiet(module: nn.Module) -> None:
    """No cache of keys and values, as while a model trains."""
    config: Any = getattr(module, "config", None)
    if hasattr(config, "use_cache"):
        config.use_cache = False
