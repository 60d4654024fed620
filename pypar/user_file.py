"""A user's own file of Python: FILE.py:FUNCTION on a command line."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn


def is_own(name: str) -> bool:
    """Whether it names a function in a file."""
    return name.rpartition(":")[0].endswith(".py") or name.endswith(".py")


def load(name: str) -> tuple[ModuleType, Any]:
    """(the file's module, the function). Raises ValueError for what isn't there, or raises."""
    file, _, function = name.rpartition(":")
    if not file.endswith(".py"):
        raise ValueError(f"{name}: name the function that makes the model, as {name}:make_model")
    path = Path(file)
    if not path.is_file():
        raise ValueError(f"{name}: there is no file {file}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(path.stem, module)  # dataclasses look their module up
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ValueError(f"{name}: {file} can't be loaded: {type(error).__name__}: {error}") from error
    make = getattr(module, function, None)
    if not callable(make):
        raise ValueError(f"{name}: {file} has no function {function!r}")
    return module, make


@dataclass
class Made:
    """What a function that makes a model returned: the model, or (model, batch), or (model, batch, loss_fn)."""

    model: nn.Module
    batch: Any = None
    loss_fn: Callable[[Any, Any], Any] | None = None


def made(name: str, make: Callable[[], Any]) -> Made:
    """make() and what it returned. Raises ValueError where that is no model, or make() raises."""
    try:
        returned = make()
    except Exception as error:
        raise ValueError(f"{name}: it raised {type(error).__name__}: {error}") from error
    parts = returned if isinstance(returned, tuple) else (returned,)
    if not 1 <= len(parts) <= 3 or not isinstance(parts[0], nn.Module):
        what = f"({', '.join(type(part).__name__ for part in parts)})" if parts is returned else type(returned).__name__
        raise ValueError(
            f"{name}: it returned {what}; expected an nn.Module, (module, batch) or (module, batch, loss_fn)"
        )
    if len(parts) == 3 and parts[2] is not None and not callable(parts[2]):
        raise ValueError(f"{name}: the loss_fn that it returned is {type(parts[2]).__name__}; expected a function")
    return Made(*parts)


def make_model(name: str, make: Callable[[], Any]) -> nn.Module:
    """The model of make(). Raises ValueError."""
    return made(name, make).model
