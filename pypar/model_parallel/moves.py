"""Values that move to where they are needed: the inputs of modules, and what the code between modules mixes."""

from __future__ import annotations

import copy
import dataclasses
import functools
import threading
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack
from torch.utils.weak import WeakTensorKeyDictionary


def map_tensors(fn: Callable[[torch.Tensor], torch.Tensor], value: Any) -> Any:
    """value with fn(x) for every tensor x in dicts, lists, tuples, dataclasses and Hugging Face outputs, nested in any
    way. What holds no tensor that fn changed is the same object as before."""
    if isinstance(value, torch.Tensor):
        return fn(value)
    if isinstance(value, (str, bytes, int, float, type(None), nn.Module)):
        return value
    if isinstance(value, (list, tuple)):
        items = [map_tensors(fn, each) for each in value]
        if all(a is b for a, b in zip(items, value, strict=True)):
            return value
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    changed: dict[Any, Any] = {}
    if isinstance(value, MutableMapping):
        changed = {key: new for key, each in value.items() if (new := map_tensors(fn, each)) is not each}
        value = copy.copy(value) if changed else value
        for key, new in changed.items():
            value[key] = new
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            each = getattr(value, field.name, None)
            if (new := map_tensors(fn, each)) is not each:
                changed[field.name] = new
        value = copy.copy(value) if changed else value
        for key, new in changed.items():
            object.__setattr__(value, key, new)
    return value


def tensors_in(value: Any) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []

    def note(x: torch.Tensor) -> torch.Tensor:
        found.append(x)
        return x

    map_tensors(note, value)
    return found


def _version(x: torch.Tensor) -> int | None:
    return None if x.is_inference() else x._version


@dataclasses.dataclass
class Moves:
    """Moves tensors, each once per device and forward. traffic: {(from, to): (moves, bytes)} of the last forward."""

    traffic: dict[tuple[str, str], tuple[int, int]] = dataclasses.field(default_factory=dict)
    _copies: WeakTensorKeyDictionary | None = None  # of a tensor, by (device, version, whether autograd records)

    def begin(self) -> None:
        self.traffic = {}
        self._copies = WeakTensorKeyDictionary()

    def end(self) -> None:
        self._copies = None

    def to(self, x: torch.Tensor, device: torch.device) -> torch.Tensor:
        source = x.device
        if source == device or x.is_meta:  # shapes alone are everywhere
            return x
        version = _version(x)
        # One made without autograd can't serve where it records; inference tensors don't tell when they change.
        key = (device, version, torch.is_grad_enabled())
        known = self._copies.setdefault(x, {}) if self._copies is not None and version is not None else {}
        if key not in known:
            known[key] = x.to(device)
            count, num_bytes = self.traffic.get((str(source), str(device)), (0, 0))
            self.traffic[str(source), str(device)] = (count + 1, num_bytes + x.numel() * x.element_size())
        return known[key]


class Align(TorchFunctionMode):
    """While it is on, a torch function whose tensors lie on several devices runs on the one that has most of their
    bytes (of equal ones the first), in-place ones where what they change lies. So the code between modules may add,
    join and compare what comes from anywhere: residual connections, positions, masks, tied weights."""

    def __init__(self, moves: Moves):
        super().__init__()
        self.moves = moves

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        target = _target(func, args, kwargs)
        if target is not None:
            move = functools.partial(self.moves.to, device=target)
            args, kwargs = map_tensors(move, args), map_tensors(move, kwargs)
        return func(*args, **kwargs)


_ANY_DEVICES = {"copy_", "__set__", "to", "backward", "grad"}  # take tensors on several devices as they are
_NOT_IN_PLACE = {"__index__", "__int__", "__invert__"}


def _target(func: Any, args: Any, kwargs: Mapping[str, Any]) -> torch.device | None:
    """Where a function is to run; None: as it is."""
    tensors = tensors_in((args, kwargs))
    if len(tensors) < 2:
        return None
    devices = [x.device for x in tensors]
    name = getattr(func, "__name__", "")
    if all(device == devices[0] for device in devices) or name in _ANY_DEVICES:
        return None
    if isinstance(kwargs.get("out"), torch.Tensor):
        return kwargs["out"].device
    in_place = name == "__setitem__" or (name.startswith("__i") and name not in _NOT_IN_PLACE)
    if in_place or (name.endswith("_") and not name.endswith("__")):
        return devices[0]
    num_bytes: dict[torch.device, int] = {}
    for x, device in zip(tensors, devices, strict=True):
        num_bytes[device] = num_bytes.get(device, 0) + x.numel() * x.element_size()
    return max(num_bytes, key=lambda device: num_bytes[device])


class Traveller:
    """Makes the modules of a placed model take their inputs to where they lie.

    A module that lies on one device moves its inputs there; inside of it nothing is watched. In the code of the others
    `Align` is on.
    """

    def __init__(
        self, root: nn.Module, devices: Mapping[int, torch.device], output_device: torch.device | str = "inputs"
    ):
        """devices: of parameters and buffers, by id. output_device: or 'inputs', or 'last'."""
        self.moves = Moves()
        self.align = Align(self.moves)
        self.output_device = output_device
        # .device: of the module that runs, if it lies on one. By thread: autograd has one per device, and computes
        # checkpointed modules again there.
        self._inside = threading.local()
        for module in list(root.modules()):
            here = {devices[id(t)] for t in (*module.parameters(), *module.buffers())}
            forward = module.forward
            if here and type(module).forward is not nn.Module.forward:
                forward = self._one_device(forward, here.pop()) if len(here) == 1 else self._several(forward)
            if module is root:
                forward = self._outermost(forward)
            if forward is not module.forward:
                module.forward = forward  # type: ignore[method-assign,assignment]

    def _outermost(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def forward(*args: Any, **kwargs: Any) -> Any:
            inputs = tensors_in((args, kwargs))
            self.moves.begin()
            try:
                output = original(*args, **kwargs)
                device = self.output_device
                if device == "inputs" and inputs:
                    device = inputs[0].device
                if not isinstance(device, torch.device):
                    return output
                return map_tensors(functools.partial(self.moves.to, device=device), output)
            finally:
                self.moves.end()

        return forward

    def _one_device(self, original: Callable[..., Any], device: torch.device) -> Callable[..., Any]:
        @functools.wraps(original)
        def forward(*args: Any, **kwargs: Any) -> Any:
            if getattr(self._inside, "device", None) == device:
                return original(*args, **kwargs)
            moved: list[tuple[torch.Tensor, torch.Tensor, int | None]] = []

            def move(x: torch.Tensor) -> torch.Tensor:
                there = self.moves.to(x, device)
                if there is not x:
                    moved.append((x, there, _version(there)))
                return there

            args, kwargs = map_tensors(move, args), map_tensors(move, kwargs)
            with self._run_on(device):
                result = original(*args, **kwargs)
            for source, there, before in moved:
                if before is not None and there._version != before:  # the module changed its input in place
                    source.copy_(self.moves.to(there, source.device))
            return result

        return forward

    def _several(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def forward(*args: Any, **kwargs: Any) -> Any:
            if self.align in _get_current_function_mode_stack():
                return original(*args, **kwargs)
            with self.align:  # off in a recomputation for a backward
                return original(*args, **kwargs)

        return forward

    @contextmanager
    def _run_on(self, device: torch.device) -> Iterator[None]:
        """Inside of a module that lies on one device, where nothing has to be watched."""
        outer, self._inside.device = getattr(self._inside, "device", None), device
        stack = _get_current_function_mode_stack()
        is_on_top = bool(stack) and stack[-1] is self.align
        if is_on_top:
            self.align.__exit__(None, None, None)
        try:
            yield
        finally:
            if is_on_top:
                self.align.__enter__()
            self._inside.device = outer


def put(root: nn.Module, devices: Mapping[int, torch.device]) -> dict[int, torch.device]:
    """Puts parameters and buffers on their devices; tied ones stay tied, and parameters stay the objects that an
    optimizer may hold, where torch can. Returns the devices by the ids of what is there now."""
    known: dict[int, Any] = {}
    found: dict[int, torch.device] = {}

    def moved(tensor: torch.Tensor) -> Any:
        if id(tensor) not in known:
            known[id(tensor)] = (tensor, _moved(tensor, devices[id(tensor)]))  # kept, so that ids stay theirs
        new = known[id(tensor)][1]
        found[id(new)] = devices[id(tensor)]
        return new

    for module in root.modules():
        for table in (module._parameters, module._buffers):
            for name, tensor in table.items():
                if tensor is not None:
                    table[name] = moved(tensor)  # type: ignore[assignment]
    return found


@torch.no_grad()
def _moved(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    if tensor.device == device:
        return tensor
    if not isinstance(tensor, nn.Parameter):
        return tensor.to(device)
    data = tensor.data.to(device)
    grad = None if tensor.grad is None else tensor.grad.to(device)
    if type(data) is torch.Tensor and torch._has_compatible_shallow_copy_type(tensor, data):
        tensor.grad = None
        tensor.data = data
        tensor.grad = grad
        return tensor
    new = nn.Parameter(data, requires_grad=tensor.requires_grad)
    new.grad = grad
    return new
