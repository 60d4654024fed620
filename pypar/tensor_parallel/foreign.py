"""Hooks for modules that keep their class: their forward runs as it is, on this rank's part."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from pypar.tensor_parallel.exchange import copy_in, reduce_out, sum_copies
from pypar.tensor_parallel.heads import Heads
from pypar.tensor_parallel.shards import Place, shards_of


def put_parameters(module: nn.Module, names: Iterable[str], seen: Callable[[nn.Parameter], torch.Tensor]) -> None:
    """During a forward, the module finds its parameters behind a function that sums their gradients over ranks.

    Not a hook on the parameter: that one would be lost when the parameter is replaced, frozen or copied.
    """
    for name in names:
        parameter = module._parameters[name]
        if parameter is not None and (stand_in := seen(parameter)) is not parameter:
            module.__dict__[name] = stand_in  # found before nn.Module looks into _parameters


def drop_parameters(module: nn.Module, names: Iterable[str]) -> None:
    for name in names:
        module.__dict__.pop(name, None)


class _SharedParameters:
    def __init__(self, place: Place):
        self.place = place

    def put(self, module: nn.Module, _args: Any) -> None:
        shards = {id(module._parameters[name]): shard for name, shard in shards_of(module).items()}

        def seen(parameter: nn.Parameter) -> torch.Tensor:
            shard = shards.get(id(parameter))
            if shard is None:
                return copy_in(parameter, self.place.group_name)
            return sum_copies(parameter, shard.cut, shard.dim, self.place.rank, self.place.group_name)

        put_parameters(module, module._parameters, seen)

    def drop(self, module: nn.Module, _args: Any, _output: Any) -> None:
        drop_parameters(module, module._parameters)


def use_shared_parameters(module: nn.Module, place: Place) -> None:
    """Parameters that every rank holds but uses on its own part of the activations: gradients are summed."""
    hooks = _SharedParameters(place)
    module.register_forward_pre_hook(hooks.put)
    module.register_forward_hook(hooks.drop)


class _SumParts:
    def __init__(self, place: Place):
        self.place = place

    def enter(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        def seen(value: Any) -> Any:
            return copy_in(value, self.place.group_name) if isinstance(value, torch.Tensor) else value

        return tuple(seen(a) for a in args), {k: seen(v) for k, v in kwargs.items()}

    def leave(self, _module: nn.Module, _args: Any, output: Any) -> Any:
        return reduce_out(output, self.place.group_name) if isinstance(output, torch.Tensor) else output


def sum_parts(module: nn.Module, place: Place, full_input: bool) -> None:
    """A module whose output is a part of a sum over the ranks. full_input: it reads tensors that every rank has."""
    hooks = _SumParts(place)
    if full_input:
        module.register_forward_pre_hook(hooks.enter, with_kwargs=True)
    module.register_forward_hook(hooks.leave)


class _CutAlibi:
    def __init__(self, heads: Heads, rank: int):
        self.heads, self.rank = heads, rank

    def __call__(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        num, (start, stop) = self.heads.num, self.heads.q[self.rank]

        def mine(given: Any) -> Any:
            if not isinstance(given, torch.Tensor):
                return given
            if given.dim() == 3 and given.shape[0] % num == 0 and given.shape[1] == 1:  # [batch * heads, 1, keys]
                return given.unflatten(0, (-1, num))[:, start:stop].flatten(0, 1)
            return given[:, start:stop].contiguous() if given.shape[1] == num else given  # [batch, heads or 1, ...]

        names = [n for n in ("alibi", "attention_mask") if n in kwargs]  # Falcon's mask has the slopes in it
        return args, kwargs | {n: mine(kwargs[n]) for n in names}


def cut_alibi(attention: nn.Module, heads: Heads, rank: int) -> None:
    """Attention that is handed the slopes of all heads (Falcon, Bloom) sees those of this rank's."""
    if "alibi" in inspect.signature(type(attention).forward).parameters:
        attention.register_forward_pre_hook(_CutAlibi(heads, rank), with_kwargs=True)
