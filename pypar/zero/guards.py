"""What can't be wrapped, and what must not happen to a module that is: errors that name the parameter."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch.distributed as dist
from torch import nn

from pypar.backend import uncompiled
from pypar.zero.flat import FlatParameters


def check_module(module: nn.Module, groups: Sequence[dict[str, Any]], group: dist.ProcessGroup) -> None:
    """Raises ValueError where ZeRO can't share a module out over the group, or its ranks hold different ones.
    Collective. groups: of the optimizer."""
    named = list(module.named_parameters())
    known = {id(parameter) for _, parameter in named}
    for each in groups:
        for parameter in each["params"]:
            if id(parameter) not in known:
                raise ValueError(
                    f"pypar.Zero: the optimizer holds a parameter of shape {list(parameter.shape)} that is none of "
                    f"{type(module).__name__}'s; make it over module.parameters()"
                )
    for name, parameter in named:
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            raise ValueError(
                f"pypar.Zero: '{name}' is not initialized; run one forward pass before wrapping the module"
            )
    for name, submodule in module.named_modules():
        if isinstance(submodule, (nn.Embedding, nn.EmbeddingBag)) and submodule.sparse:
            raise ValueError(f"pypar.Zero: '{name}' makes sparse gradients, which have no shards; use sparse=False")
    trained = {id(parameter) for each in groups for parameter in each["params"]}
    mine = [f"'{n}' {p.dtype} {list(p.shape)} {'trained' if id(p) in trained else 'frozen'}" for n, p in named]
    _check_same(mine, group)


def _check_same(mine: list[str], group: dist.ProcessGroup) -> None:
    ranks: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(ranks, hashlib.sha256(repr(mine).encode()).hexdigest(), group=group)
    if len(set(ranks)) == 1:
        return
    dist.all_gather_object(ranks, mine, group=group)
    for rank, theirs in enumerate(ranks):
        for n in range(max(len(theirs), len(ranks[0]))):
            first, other = (each[n] if n < len(each) else "missing" for each in (ranks[0], theirs))
            if first != other:
                raise ValueError(
                    f"pypar.Zero: the ranks hold different modules: parameter {n} is {first} on rank 0, {other} on "
                    f"rank {rank}; build the same module and optimizer groups on every rank"
                )


class Watch:
    """Of the parameters as they were wrapped."""

    def __init__(self, module: nn.Module, rank: int):
        self.rank = rank
        self.modules = [(name, each, dict(each._parameters)) for name, each in module.named_modules()]
        self.trains = [(name, p, p.requires_grad) for name, p in module.named_parameters()]

    @uncompiled
    def check(self) -> None:
        """Raises RuntimeError: a parameter was replaced, added or removed, frozen or unfrozen."""
        for name, module, parameters in self.modules:
            for own in parameters if len(parameters) == len(module._parameters) else module._parameters | parameters:
                if module._parameters.get(own) is not parameters.get(own):
                    self._raise(f"{name}.{own}" if name else own, "is not the parameter that was wrapped")
        for name, parameter, trains in self.trains:
            if parameter.requires_grad != trains:
                how = "requires no gradient, and did" if trains else "requires a gradient, and did not"
                self._raise(name, f"{how} when the module was wrapped")

    def _raise(self, name: str, what: str) -> None:
        raise RuntimeError(
            f"pypar.Zero, rank {self.rank}: '{name}' {what}; change the module first, then wrap it, and values in place"
        )


def refuse_state_dicts(module: nn.Module, flats: list[FlatParameters]) -> None:
    """From now on, while `flats`, the module's, aren't whole, it gives and takes no state dict, rather than an empty
    one. The errors are RuntimeErrors."""

    def where() -> str:
        unit = f"unit '{flats[0].unit}'" if flats[0].unit else "the root unit"
        return "" if all(flat.is_full for flat in flats) else f"the values of {unit} are not on this rank"

    def give(_module: nn.Module, *_: Any) -> None:
        if where():
            raise RuntimeError(
                f"pypar.Zero: state_dict(), while {where()}; use full_state_dict() or sharded_state_dict() of the "
                "wrapper, or call it within full_params()"
            )

    def take(_module: nn.Module, *_: Any) -> None:
        if where():
            raise RuntimeError(
                f"pypar.Zero: load_state_dict(), while {where()}; use the wrapper's load_state_dict() or "
                "load_full_state_dict()"
            )

    module.register_state_dict_pre_hook(give)
    module.register_load_state_dict_pre_hook(take)
