"""A user's own file of Python: FILE.py:FUNCTION on a command line."""

from __future__ import annotations

import importlib.util
import sys
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


def make_model(name: str, make: Any) -> nn.Module:
    """make(), which must give a module. Raises ValueError."""
    try:
        model = make()
    except Exception as error:
        raise ValueError(f"{name}: it raised {type(error).__name__}: {error}") from error
    if not isinstance(model, nn.Module):
        raise ValueError(f"{name}: it returned {type(model).__name__}; expected an nn.Module")
    return model
