"""Sequence parallel: between the matmuls, each rank has its rows of the hidden states alone (rows.py).

Hooks on a stack of decoder layers:
  first layer        takes this rank's rows of a full tensor; the final norm, or the last layer, gathers them
  attention, MLP     read all rows (GatheredRows) and end in a row-parallel layer, whose sum is scattered
  other parts        that are cut (experts, nested modules) get full tensors, and are cut to rows again behind
  norms and the like run on rows; the gradients of their parameters are summed once per backward

Source: Korthikanti et al., Reducing Activation Recomputation in Large Transformer Models (2022).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from pypar.tensor_parallel.foreign import drop_parameters, put_parameters
from pypar.tensor_parallel.rows import GatheredRows, Rows, mark, note_taken, rows_of, taken_of
from pypar.tensor_parallel.shards import Place, shards_of

MIN_ROWS = 48  # below, one small message beats two: kernels.md 1


class RowsInForce:
    """Of one stack of layers: how the rows of the running forward lie; None: full tensors, as without this.

    owners: (module, name) of the parameters that ranks use on their rows.

    What gets a marked tensor brings `rows` up to date, so that layers that are computed again in backward (activation
    checkpointing) find those of their own forward.
    """

    def __init__(self, place: Place, owners: list[tuple[nn.Module, str]]):
        self.place, self.owners = place, owners
        self.rows: Rows | None = None
        self.is_running = False  # the forward of the module that owns the stack
        self.is_open = False  # rows were taken and not gathered again
        self.is_off = False  # during this forward

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "rows": None, "is_running": False}  # of a forward that a copy of the model hasn't seen

    def of(self, x: Any) -> Rows | None:
        rows = rows_of(x)
        if rows is not None:
            self.rows = rows
        return self.rows

    def open(self, full: torch.Tensor) -> torch.Tensor:
        """This rank's rows, where there are enough; else the full tensor."""
        self.rows = None if self.is_running else taken_of(full)
        if self.rows is not None:  # computed again in backward: the rows of that forward
            return mark(self.rows.take(full), self.rows)
        if self.is_off or math.prod(full.shape[:-1]) < max(MIN_ROWS, self.place.world_size):
            return full
        parameters = [p for m, n in self.owners if (p := m._parameters[n]) is not None]
        self.rows, self.is_open = Rows.of(full, self.place, parameters), self.is_running
        note_taken(full, self.rows)
        return mark(self.rows.take(full), self.rows)

    def close(self, x: torch.Tensor, rows: Rows) -> torch.Tensor:
        self.is_open = False
        return rows.gather(x)


class StackHooks:
    """On the module that owns the stack."""

    def __init__(self, force: RowsInForce, name: str):
        self.force, self.name = force, name

    def attach(self, owner: nn.Module) -> None:
        owner.register_forward_pre_hook(self.enter, with_kwargs=True)
        owner.register_forward_hook(self.leave, always_call=True)

    def enter(self, owner: nn.Module, _args: Any, kwargs: dict[str, Any]) -> None:
        # Who asks for the hidden states of every layer wants full ones.
        asked = kwargs.get("output_hidden_states")
        if asked is None:
            asked = getattr(getattr(owner, "config", None), "output_hidden_states", False)
        self.force.is_off, self.force.is_open, self.force.is_running = bool(asked), False, True

    def leave(self, _owner: nn.Module, _args: Any, output: Any) -> None:
        self.force.is_running = False
        if self.force.is_open and output is not None:  # None: forward raised
            self.force.is_open = False
            raise RuntimeError(
                f"{self.name or 'the model'}: nothing gathered the rows that the last layer left; use "
                "sequence_parallel=False, or call the final norm with the last layer's output"
            )


class LayerHooks:
    """On each layer of the stack."""

    def __init__(self, force: RowsInForce, name: str, is_first: bool, gathers: bool, names: list[str]):
        self.force, self.name, self.is_first, self.gathers = force, name, is_first, gathers
        self.names = names  # of its own parameters

    def attach(self, layer: nn.Module) -> None:
        layer.register_forward_pre_hook(self.enter, with_kwargs=True)
        layer.register_forward_hook(self.leave)

    def enter(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        key, hidden = hidden_states(args, kwargs, self.name)
        rows = rows_of(hidden)
        if rows is not None:
            self.force.rows = rows
        elif self.is_first:
            hidden = self.force.open(hidden)
        elif (rows := self.force.rows) is not None:
            if not rows.fits(hidden):
                raise RuntimeError(
                    f"{self.name} got {tuple(hidden.shape)}, but this rank's rows are {(1, rows.mine)}: what the model "
                    "does between its layers doesn't go with sequence_parallel=True"
                )
            mark(hidden, rows)
        if self.names and self.force.rows is not None:
            put_parameters(layer, self.names, self.force.rows.seen)
        return replaced(args, kwargs, key, hidden)

    def leave(self, layer: nn.Module, _args: Any, output: Any) -> Any:
        rows = self.force.rows
        if rows is None:
            return output
        drop_parameters(layer, self.names)

        def close(x: torch.Tensor) -> torch.Tensor:
            if not rows.fits(x):
                raise RuntimeError(
                    f"{self.name} gave {tuple(x.shape)}, but this rank's rows are {(1, rows.mine)}: its forward "
                    "doesn't go with sequence_parallel=True"
                )
            return self.force.close(x, rows) if self.gathers else mark(x, rows)

        return on_output(output, close)


class ByRow:
    """On a module that computes row by row: it runs on this rank's rows. final: it gathers them behind."""

    def __init__(self, force: RowsInForce, names: list[str], final: bool = False):
        self.force, self.names, self.final = force, names, final

    def attach(self, module: nn.Module) -> None:
        module.register_forward_pre_hook(self.enter)
        module.register_forward_hook(self.leave)

    def _rows(self, args: tuple[Any, ...]) -> Rows | None:
        x = args[0] if args else None
        return rows_of(x) if self.final else self.force.of(x)  # a final norm may see other tensors before

    def enter(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        rows = self._rows(args)
        if rows is not None:
            put_parameters(module, self.names, rows.seen)

    def leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        rows = self._rows(args)
        if rows is None:
            return output
        drop_parameters(module, self.names)
        return self.force.close(output, rows) if self.final else output


class ReadsAllRows:
    """On attention and MLP: column-parallel layers that read its input do so from all ranks."""

    def __init__(self, force: RowsInForce, name: str):
        self.force, self.name = force, name

    def attach(self, module: nn.Module) -> None:
        module.register_forward_pre_hook(self.enter, with_kwargs=True)

    def enter(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        key, hidden = hidden_states(args, kwargs, self.name)
        rows = self.force.of(hidden)
        if rows is None:
            return None
        # In a compiled graph an ordinary tensor, which each layer then copies in.
        full = rows.gather(hidden) if torch.compiler.is_compiling() else GatheredRows(hidden, rows)
        return replaced(args, kwargs, key, full)


class OnFull:
    """On a part whose inside knows nothing of rows: gathered before it, cut again behind it."""

    def __init__(self, force: RowsInForce, name: str):
        self.force, self.name = force, name

    def attach(self, module: nn.Module) -> None:
        module.register_forward_pre_hook(self.enter, with_kwargs=True)
        module.register_forward_hook(self.leave)

    def enter(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        key, hidden = hidden_states(args, kwargs, self.name)
        rows = self.force.of(hidden)
        return None if rows is None else replaced(args, kwargs, key, rows.gather(hidden))

    def leave(self, _module: nn.Module, _args: Any, output: Any) -> Any:
        rows = self.force.rows
        return output if rows is None else on_output(output, rows.take)


def hidden_states(args: tuple[Any, ...], kwargs: dict[str, Any], where: str) -> tuple[int | str, torch.Tensor]:
    """The argument of that name, else the first floating tensor of at least two dims."""
    if isinstance(kwargs.get("hidden_states"), torch.Tensor):
        return "hidden_states", kwargs["hidden_states"]
    given: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
    for key, value in given:
        if isinstance(value, torch.Tensor) and value.is_floating_point() and value.dim() >= 2:
            return key, value
    raise RuntimeError(f"{where} is called without hidden states: use sequence_parallel=False")


def replaced(args: tuple[Any, ...], kwargs: dict[str, Any], key: int | str, value: Any) -> tuple[Any, dict[str, Any]]:
    if isinstance(key, int):
        return (*args[:key], value, *args[key + 1 :]), kwargs
    return args, {**kwargs, key: value}


def on_output(output: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """The hidden states are the output, or its first part."""
    if isinstance(output, torch.Tensor):
        return change(output)
    if isinstance(output, tuple) and output and isinstance(output[0], torch.Tensor):
        return (change(output[0]), *output[1:])
    return output


def uncut(module: nn.Module) -> list[str]:
    """Its own parameters that every rank holds whole."""
    return [n for n, p in module._parameters.items() if p is not None and n not in shards_of(module)]
