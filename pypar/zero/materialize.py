"""Parameters that were created on `meta` get memory and values a unit at a time."""

from __future__ import annotations

import ctypes
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from pypar.zero.units import Unit


class Values(ABC):
    """Gives the parameters of units values."""

    @abstractmethod
    def run(self, units: list[Unit]) -> Iterator[Unit]:
        """Yields each unit when its parameters are there, the same on every rank, in the same order. Collective."""


Init = str | Callable[[nn.Module], Any] | Mapping[str, torch.Tensor] | Values
RESET = "reset_parameters"
OWN = "_init_weights"  # a model's function of a module, by which Hugging Face's, and many others, draw their weights
_NAN = float("nan")


def needs_memory(module: nn.Module) -> bool:
    return any(tensor.is_meta for tensor in (*module.parameters(), *module.buffers()))


def allocate(parameter: nn.Parameter, device: torch.device, fill: float | None = None) -> None:
    """Memory for a parameter that is on meta. It stays the same object: optimizers, tied modules and the caller hold
    it."""
    if not parameter.is_meta:
        return
    values = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
    if fill is not None and values.is_floating_point():
        values.fill_(fill)
    made = nn.Parameter(values, requires_grad=parameter.requires_grad)
    made.__dict__.update(parameter.__dict__)
    torch.utils.swap_tensors(parameter, made)


class Materializer(Values):
    """Of a module some of whose parameters or buffers are on meta.

    Rank 0 alone runs `init`, on each module once, children before their parents, as nn.Module.apply does; a unit's
    values then go to every rank. So the weights are those of module.to_empty(device=...).apply(init) in one process,
    with rank 0's seed, whatever the number of ranks. They get memory on torch.get_default_device().

    groups  in which the values go from rank 0 to all, one after the other
    init    "reset_parameters": each module's own; a function of a module; or a state dict of full tensors, where
            rank 0's counts. Default: the root's _init_weights if it has one (Hugging Face's models do), else
            "reset_parameters". Modules that hold nothing on meta are left as they are; a state dict sets all
            parameters, and buffers that it lacks since none of their values is saved are set by the default

    Raises ValueError, on every rank: what init leaves unset, or lacks; and whatever init raises.
    """

    def __init__(
        self, root: nn.Module, groups: list[dist.ProcessGroup], init: Init | None = None, caller: str = "pypar.Zero"
    ):
        self.caller = caller
        own = _own_init(root)
        self.reset: Callable[[nn.Module], Any] = own or _reset
        self.root, self.groups, self.init = root, groups, (own or RESET) if init is None else init
        self.draws = all(dist.get_rank(group) == 0 for group in groups)
        self.device = torch.get_default_device()
        self.order = list(_post_order(root, "", set()))
        self.visited = 0
        self.is_concerned = {id(m): isinstance(self.init, Mapping) or needs_memory(m) for _, m in self.order}
        self.unit_of: dict[int, Unit] = {}
        self.aliases: dict[int, list[str]] = {}  # of each parameter, by id
        for name, parameter in root.named_parameters(remove_duplicate=False):
            self.aliases.setdefault(id(parameter), []).append(name)
        self.cut: list[tuple[str, nn.Parameter]] = []  # those of units that are done
        if isinstance(self.init, str):
            self._check_resets()

    def _check_resets(self) -> None:
        if self.init != RESET:
            raise ValueError(
                f"{self.caller}: init={self.init!r}; give '{RESET}', a function of a module, or a state dict"
            )
        for name, module in self.order:
            if any(t.is_meta for _, t in _own_tensors(module)) and _reset_of(module) is None:
                raise ValueError(
                    f"{self.caller}: {_shown(name, module)} has parameters or buffers on meta and no {RESET}(); give "
                    "init=: a function that gets each module, or a state dict"
                )

    def run(self, units: list[Unit]) -> Iterator[Unit]:
        self.unit_of = {id(p): unit for unit in units for p in unit.parameters}
        last = {id(module): at + 1 for at, (_, module) in enumerate(self.order)}
        for unit in sorted(units, key=lambda unit: last[id(unit.module)]):
            self._agree(lambda unit=unit: self._initialise(last[id(unit.module)], unit))  # type: ignore[misc]
            self._allocate(unit)
            self._send([p.detach() for p in unit.parameters])
            yield unit
            self.cut += zip(unit.names, unit.parameters, strict=True)
            _give_back()
        self._agree(lambda: self._initialise(len(self.order), None))
        for _, module in self.order:
            self._allocate_buffers(module)
        self._send([buffer.detach() for buffer in self.root.buffers()])

    def _send(self, tensors: list[torch.Tensor]) -> None:
        for group in self.groups:
            for tensor in tensors:  # one by one: together they would be copied
                dist.broadcast(tensor, group=group, group_src=0)

    def _agree(self, work: Callable[[], None]) -> None:
        """work() on rank 0; what it raises is raised on every rank."""
        error: Exception | None = None
        said: list[Any] = [None]
        if self.draws:
            try:
                work()
            except Exception as caught:
                error, said = caught, [str(caught) if isinstance(caught, _Refused) else f"init raised {caught!r}"]
        for group in self.groups:
            dist.broadcast_object_list(said, group=group, group_src=0)
        if said[0] is not None:
            raise ValueError(f"{self.caller}: {said[0]}") from error

    # -- memory ----------------------------------------------------------------------------------------------------

    def _allocate(self, unit: Unit) -> None:
        for parameter in unit.parameters:
            allocate(parameter, self.device, _NAN if self.draws else None)

    def _allocate_buffers(self, module: nn.Module) -> None:
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_meta:
                made = torch.empty(buffer.shape, dtype=buffer.dtype, device=self.device)
                module._buffers[name] = made.fill_(_NAN) if made.is_floating_point() and self.draws else made

    # -- values, on rank 0 -----------------------------------------------------------------------------------------

    @torch.no_grad()
    def _initialise(self, end: int, unit: Unit | None) -> None:
        """Visits the modules up to `end` in the order, the last of which is the unit's."""
        versions = [parameter._version for _, parameter in self.cut]
        for name, module in self.order[self.visited : end]:
            for _, parameter in _own_tensors(module):
                if id(parameter) in self.unit_of:
                    self._allocate(self.unit_of[id(parameter)])
            had = {n: b for n, b in module._buffers.items() if b is not None and b.is_meta}
            self._allocate_buffers(module)
            if not self.is_concerned[id(module)]:
                continue
            if isinstance(self.init, Mapping):
                self._take(name, module, self.init)
                if not module._parameters and had.keys() & module._non_persistent_buffers_set:
                    self.reset(module)
            elif callable(self.init):
                self.init(module)
            else:
                _reset(module)
            for n in had:
                self._check_set(f"{name}.{n}" if name else n, module._buffers[n])
        self.visited = max(self.visited, end)
        for (name, parameter), version in zip(self.cut, versions, strict=True):
            if parameter._version != version:
                raise _Refused(
                    f"init= changes '{name}' at a module outside of its unit, when that has been cut; change it at the "
                    "unit's own modules, or choose larger units="
                )
        if unit is not None:
            for name, parameter in zip(unit.names, unit.parameters, strict=True):
                self._check_set(name, parameter)

    def _take(self, prefix: str, module: nn.Module, state: Mapping[str, torch.Tensor]) -> None:
        for own, tensor in _own_tensors(module):
            names = self.aliases.get(id(tensor), [f"{prefix}.{own}" if prefix else own])
            found = next((n for n in names if n in state), None)
            if found is not None:
                if state[found].shape != tensor.shape:
                    shapes = (
                        f"{list(state[found].shape)} in the state dict of init=, {list(tensor.shape)} in the module"
                    )
                    raise _Refused(f"'{found}' is {shapes}")
                tensor.copy_(state[found])
            elif own not in module._non_persistent_buffers_set:
                raise _Refused(f"the state dict of init= has no '{names[0]}'")

    def _check_set(self, name: str, tensor: torch.Tensor | None) -> None:
        if tensor is not None and tensor.is_floating_point() and bool(tensor.isnan().any()):
            raise _Refused(f"init= leaves '{name}' unset (or sets it to nan)")


def _give_back() -> None:
    """What a unit has let go goes back to the system: the heap would keep it, in holes that the next doesn't fit."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
    if trim is not None:
        trim(0)


class _Refused(Exception):
    pass


def _post_order(module: nn.Module, name: str, seen: set[int]) -> Iterator[tuple[str, nn.Module]]:
    if id(module) in seen:
        return
    seen.add(id(module))
    for child_name, child in module.named_children():
        yield from _post_order(child, f"{name}.{child_name}" if name else child_name, seen)
    yield name, module


def _own_tensors(module: nn.Module) -> list[tuple[str, torch.Tensor]]:
    found = (*module._parameters.items(), *module._buffers.items())
    return [(name, tensor) for name, tensor in found if tensor is not None]


def _reset_of(module: nn.Module) -> Callable[[], Any] | None:
    # nn.MultiheadAttention and nn.Transformer have it under the second name.
    return getattr(module, RESET, None) or getattr(module, "_reset_parameters", None)


def _own_init(root: nn.Module) -> Callable[[nn.Module], Any] | None:
    """The root's own function of a module; some models have one of that name that takes none."""
    own = getattr(root, OWN, None)
    if not callable(own):
        return None
    try:
        inspect.signature(own).bind(root)
    except TypeError:
        return None
    return own


def _reset(module: nn.Module) -> None:
    if (reset := _reset_of(module)) is not None:
        reset()


def _shown(name: str, module: nn.Module) -> str:
    return f"'{name}' ({type(module).__name__})" if name else type(module).__name__
