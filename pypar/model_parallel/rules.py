"""Explicit maps: patterns of names to devices."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn


def tensors_of(module: nn.Module) -> dict[str, torch.Tensor]:
    """All parameters and buffers by every name they have, buffers that state_dict leaves out among them."""
    return {
        **dict(module.named_parameters(remove_duplicate=False)),
        **dict(module.named_buffers(remove_duplicate=False)),
    }


def resolve(
    module: nn.Module, device_map: Mapping[str, Any], name_of: Callable[[Any], str], ties_cross: bool = False
) -> dict[str, str]:
    """{name of a tensor: device}. A pattern ('model.layers.*', '*.mlp') covers the modules and tensors that it matches,
    and all inside of them; of several the last one counts; '' is the whole model.

    ties_cross: tied weights may have several devices.
    Raises ValueError: a pattern that matches nothing, tensors that none covers, tied weights on two devices.
    """
    tensors = tensors_of(module)
    rules = [(str(pattern), name_of(device)) for pattern, device in device_map.items()]
    names = [name for name, _ in module.named_modules(remove_duplicate=False)]
    for pattern, _ in rules:
        if pattern and not any(fnmatchcase(name, pattern) for name in (*names, *tensors)):
            near = difflib.get_close_matches(pattern, [n for n in names if n], 3, 0.4) or [n for n in names if n][:3]
            raise ValueError(f"device_map: '{pattern}' matches no module of {type(module).__name__}; near: {near}")
    found: dict[str, str] = {}
    missing = []
    for name in tensors:
        covers = [device for pattern, device in rules if any(fnmatchcase(n, pattern) for n in _with_parents(name))]
        if covers:
            found[name] = covers[-1]
        else:
            missing.append(name)
    if missing:
        some = ", ".join(missing[:4]) + (", ..." if len(missing) > 4 else "")
        raise ValueError(
            f"device_map covers {len(tensors) - len(missing)} of {len(tensors)} tensors; it has no device for {some}. "
            "An entry '' in front is the default of all"
        )
    if not ties_cross:
        _check_ties(tensors, found)
    return found


def _with_parents(name: str) -> Iterator[str]:
    yield name
    while "." in name:
        name = name.rpartition(".")[0]
        yield name
    yield ""


def _check_ties(tensors: dict[str, torch.Tensor], devices: dict[str, str]) -> None:
    first: dict[int, str] = {}
    for name, tensor in tensors.items():
        other = first.setdefault(id(tensor), name)
        if devices[name] != devices[other]:
            raise ValueError(
                f"device_map: '{name}' and '{other}' are one tied tensor, which can't be on {devices[name]} and on "
                f"{devices[other]}; give both modules one device"
            )
