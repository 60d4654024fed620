"""Stage 3 where parameters come and go: a unit's parameters are whole while it computes, and gone otherwise.

The next unit's are gathered while a unit computes, in forward and in backward, so that at most two units are whole at a
time; besides the root's, which are needed all the time, and a unit's around the one that computes.

What is gathered and freed, and when, follows from the order in which this rank enters units alone, so that ranks which
run the same model issue the same collectives in the same order.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from pypar.backend import uncompiled
from pypar.zero.flat import FlatParameters
from pypar.zero.order import Order


class GatheredUnit:
    """stays: until backward has passed it (the root's)."""

    def __init__(self, flats: Sequence[FlatParameters], stays: bool):
        self.flats, self.stays = list(flats), stays
        self.around: set[GatheredUnit] = set()  # units that were computing when this one was entered
        self.pinned = False  # until the end of a backward: nothing will say when it is needed
        self.is_trained = any(p.requires_grad for flat in flats for p in flat.parameters)

    @property
    def is_whole(self) -> bool:
        """Or on its way."""
        return any(not flat.is_freed for flat in self.flats)

    def start(self) -> None:
        for flat in self.flats:
            flat.start_gather()

    def gather(self) -> None:
        self.start()
        for flat in self.flats:
            flat.gather()

    def free(self) -> None:
        self.pinned = False
        for flat in self.flats:
            flat.free()


class Gatherer:
    """Gathers and frees the units of one module. settle(): collective of a host's ranks, after units were freed."""

    def __init__(self, settle: Callable[[], None] | None = None):
        self.units: list[GatheredUnit] = []
        self.whole: dict[GatheredUnit, None] = {}  # or on their way, in the order in which they were started
        self.active: list[GatheredUnit] = []  # whose forward runs, outermost first
        self.forward: Order[GatheredUnit] = Order()
        self.backward: Order[GatheredUnit] = Order()
        self._settle = settle
        self._backward_of: list[GatheredUnit] = []  # the forward pass whose backward was learnt
        self._graph_task = -1  # whose end is waited for
        self._keeps = 0  # nothing is freed
        self._differentiates_twice = False

    def add(self, flats: Sequence[FlatParameters], module: nn.Module, stays: bool) -> None:
        unit = GatheredUnit(flats, stays)
        self.units.append(unit)
        # First of all: hooks that were there before (tensor parallel's) use parameters.
        module.register_forward_pre_hook(
            lambda _module, args, kwargs: self.enter(unit, (args, kwargs)), with_kwargs=True, prepend=True
        )
        module.register_forward_hook(
            lambda _module, args, kwargs, output: self.leave(unit, (args, kwargs), output),
            with_kwargs=True,
            always_call=True,
        )

    # -- a pass of the whole module ------------------------------------------------------------------------------------

    @contextmanager
    def passing(self) -> Iterator[None]:
        """Around the forward of the whole module."""
        if not self.units or self.active or _in_backward():
            yield
            return
        self._differentiates_twice = False
        self._graph_task, self.backward.now = -1, []  # of a backward that raised
        self.forward.begin()
        try:
            yield
        finally:
            self.active.clear()
        if not torch.is_grad_enabled():
            self.finish()

    @uncompiled
    def watch(self, output: torch.Tensor) -> None:
        """A backward through `output`, which the whole module returned, is seen to its end."""
        if self.units:
            output.register_hook(lambda _grad: self._reach_backward())

    def _reach_backward(self) -> None:
        if torch.is_grad_enabled():  # create_graph: the next backward reads parameters before any unit is entered
            self._differentiates_twice = True
        self._see_backward()

    def _see_backward(self) -> None:
        task = torch._C._current_graph_task_id()
        if task == self._graph_task:
            return
        if self._graph_task == -1 and not self.backward.now:
            learnt = self._backward_of == self.forward.now
            self.backward.begin(None if learnt else self.forward.now[::-1])
            self._backward_of = self.forward.now
        self._graph_task = task
        torch.autograd.Variable._execution_engine.queue_callback(self._backward_ended)

    def _backward_ended(self) -> None:
        if torch._C._current_autograd_node() is not None:
            return  # of a reentrant checkpoint: the outer backward goes on
        self._graph_task = -1
        self.backward.begin()
        self.finish()

    def finish(self) -> None:
        """Nothing is needed until the next pass."""
        self.free()
        if self._settle is not None:
            self._settle()

    def free(self) -> None:
        if self._keeps or self._differentiates_twice:
            return
        for unit in self.units:
            self._let_go(unit)

    @contextmanager
    def keeping(self) -> Iterator[None]:
        """Everything is whole within the block."""
        for unit in self.units:
            self.whole[unit] = None
            unit.gather()
        self._keeps += 1
        try:
            yield
        finally:
            self._keeps -= 1

    # -- a unit --------------------------------------------------------------------------------------------------------

    def need(self, unit: GatheredUnit, order: Order[GatheredUnit]) -> None:
        """`unit` is whole afterwards, the next one on its way, and others are gone."""
        if not unit.stays and not (order is self.backward and order.now and order.now[-1] is unit):
            order.follow(unit)
        if not (self._keeps or self._differentiates_twice):
            kept = {unit, order.next, *self.active, *unit.around}
            for other in list(self.whole):
                # In backward, a unit whose turn was before is done: autograd runs the nodes of later forwards first.
                if not (other in kept or other.stays or other.pinned):
                    self._let_go(other)
        self.whole[unit] = None
        unit.gather()
        if order.next is not None:
            self.whole[order.next] = None
            order.next.start()

    def _let_go(self, unit: GatheredUnit) -> None:
        unit.free()
        self.whole.pop(unit, None)

    @uncompiled
    def enter(self, unit: GatheredUnit, _args: Any) -> None:
        unit.around.update(other for other in self.active if other is not unit)
        self.active.append(unit)
        if _in_backward():  # a checkpoint is computed again
            self._see_backward()
            self.need(unit, self.backward)
        else:
            self.need(unit, self.forward)

    @uncompiled
    def leave(self, unit: GatheredUnit, args: Any, output: Any) -> None:
        if not self.active or self.active[-1] is not unit:
            return  # it raised before it was entered
        self.active.pop()
        given = {id(x) for x in _tensors(args)}
        outputs = [x for x in _tensors(output) if x.requires_grad and id(x) not in given]
        for x in outputs:
            x.register_hook(lambda _grad: self._enter_backward(unit))
        if _in_backward() or self._keeps:
            return  # its backward comes next
        needs_backward = bool(outputs)
        if torch.is_grad_enabled() and not needs_backward and output is not None:
            # Whatever it returned may hold tensors that can't be seen here.
            unit.pinned = unit.is_trained or any(x.requires_grad for x in _tensors(args))
        ends = needs_backward and (unit.stays or (bool(self.forward.last) and self.forward.next is None))
        if not (ends or unit.pinned or self.forward.next is unit or unit in self.active):
            self._let_go(unit)

    def _enter_backward(self, unit: GatheredUnit) -> None:
        self._reach_backward()
        self.need(unit, self.backward)


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    """In whatever a module takes or gives, dataclasses included."""
    for leaf in pytree.tree_leaves(value):
        if isinstance(leaf, torch.Tensor):
            yield leaf
        elif dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
            yield from _tensors([getattr(leaf, field.name, None) for field in dataclasses.fields(leaf)])
