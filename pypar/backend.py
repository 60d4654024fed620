"""Registers the process group `pypar` with torch.distributed, and says whether the compiled extension is there.

Importing this module is what makes `init_process_group("pypar")` known. Without the extension nothing is registered,
and what needs it says so when it is asked for.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import warnings
from datetime import timedelta
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist

NAME = "pypar"

_log = logging.getLogger(__name__)
# torch.compiler.disable, but for when it loads Dynamo, which takes a second: not where pypar is imported, but when the
# function is called first. torch has it for its own code.
uncompiled = getattr(torch, "_disable_dynamo", torch.compiler.disable)


def _load_extension() -> ModuleType | None:
    if importlib.util.find_spec("pypar._C") is None:
        return None
    try:
        return importlib.import_module("pypar._C")
    except ImportError as error:
        raise ImportError(_explain(error)) from error


def _explain(error: ImportError) -> str:
    """Why an extension that is there can't be loaded: nearly always another torch than it was built against."""
    return (
        f"pypar._C was built against torch {build_constant('TORCH_VERSION')} and can't be loaded by torch "
        f"{torch.__version__}: {error}. "
        "Reinstall pypar in this environment (pip install --no-build-isolation --force-reinstall --no-deps)."
    )


def build_constant(name: str) -> str:
    """From pypar._build, which setup.py writes beside the extension; "unknown" without it."""
    if importlib.util.find_spec("pypar._build") is None:
        return "unknown"
    return getattr(importlib.import_module("pypar._build"), name, "unknown")


extension = _load_extension()
"""pypar._C, or None when pypar was installed without a compiler."""


def available() -> bool:
    """True when the compiled extension is there and loaded."""
    return extension is not None


def build_info() -> dict[str, str]:
    """What the extension was built with: torch, compiler, commit. Empty without it."""
    if extension is None:
        return {}
    return {**extension.build_info(), "commit": build_constant("COMMIT")}


def _connect_hosts(
    store: dist.Store,
    rank: int,
    size: int,
    across_index: int,
    across_rank: int,
    across_size: int,
    timeout: timedelta,
) -> tuple[Any, Any]:
    """The gloo groups of a group that spans hosts: over all ranks, and over one rank of each host."""

    def gloo(prefix: str, rank: int, size: int) -> Any:
        return dist.ProcessGroupGloo(dist.PrefixStore(prefix, store), rank, size, timeout=timeout)

    whole = gloo("pypar/whole", rank, size)
    across = gloo(f"pypar/across/{across_index}", across_rank, across_size) if across_index >= 0 else None
    return whole, across


def _create(options: Any, backend_options: Any) -> Any:
    assert extension is not None
    if backend_options is not None and not isinstance(backend_options, extension.Options):
        warnings.warn(f"pypar takes no {type(backend_options).__name__}; it is ignored", stacklevel=2)
    timeout = options.timeout
    if not isinstance(timeout, timedelta):
        timeout = timedelta(seconds=timeout)
    return extension.ProcessGroup(options.store, options.group_rank, options.group_size, options.group_id, timeout)


def _register() -> None:
    if extension is None:
        _log.warning("pypar has no compiled extension here: the plain-torch reference and gloo serve instead")
        return
    extension.set_inner_factory(_connect_hosts)
    dist.Backend.register_backend(NAME, _create, extended_api=True, devices=["cpu"])


_register()
