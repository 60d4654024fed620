"""Devices and budgets as users write them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch

Device = str | int | torch.device
Budget = dict[str, int | None]  # device -> bytes that it may hold, None: any number

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?I?)B\s*", re.IGNORECASE)
_FREE = 0.9  # of an accelerator's free memory, by default: the rest is for activations and the allocator


def device_name(device: Device) -> str:
    """'cpu', 'cuda:1', ...; a number is an accelerator, a rank ('rank:1') stays as it is. Raises ValueError."""
    if isinstance(device, bool) or not isinstance(device, (str, int, torch.device)):
        raise ValueError(f"device {device!r}: give a name such as 'cuda:0', a number, or a torch.device")
    if isinstance(device, int):
        accelerator = torch.accelerator.current_accelerator()
        return f"{accelerator.type if accelerator else 'cuda'}:{device}"
    try:
        return str(torch.device(device))
    except RuntimeError as error:
        raise ValueError(f"unknown device {device!r}: {str(error).splitlines()[0]}") from None


def real_device(name: str) -> torch.device:
    """The device that a tensor put on `name` says it is on. torch has one CPU: 'cpu:0' and 'cpu:1' are both 'cpu', so
    that nothing is copied between them. Raises ValueError for a device that isn't here."""
    try:
        return torch.empty(0, device=torch.device(name)).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        count = torch.accelerator.device_count()
        raise ValueError(
            f"unknown device '{name}': this machine has the CPU and {count} accelerator{'' if count == 1 else 's'} "
            f"({str(error).splitlines()[0]})"
        ) from None


def parse_size(size: int | str) -> int:
    """Bytes of 1000, '200MB', '1.5GiB'. Raises ValueError."""
    if isinstance(size, int) and not isinstance(size, bool) and size >= 0:
        return size
    match = _SIZE.fullmatch(size) if isinstance(size, str) else None
    if match is None:
        raise ValueError(f"memory {size!r}: give bytes, or a text such as '200MB' or '1.5GiB'")
    return int(float(match[1]) * _UNITS[match[2].upper()])


def format_size(num_bytes: int) -> str:
    value, unit = float(num_bytes), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if value < 1024:
            break
        value, unit = value / 1024, larger
    return f"{num_bytes} B" if unit == "B" else f"{value:.2f} {unit}"


def is_budget(device_map: Mapping[Any, Any]) -> bool:
    """Whether {device: size} is meant, and not {name of a module: device}."""

    def is_device(key: Any) -> bool:
        try:
            device_name(key)
        except ValueError:
            return False
        return True

    def is_size(value: Any) -> bool:
        return (
            value is None or isinstance(value, int) or (isinstance(value, str) and _SIZE.fullmatch(value) is not None)
        )

    return bool(device_map) and all(is_device(k) and is_size(v) for k, v in device_map.items())


def budget_of(memory: Mapping[Device, int | str | None] | None) -> Budget:
    """By device, accelerators first. None: what is free on this machine's accelerators, or, without any, its CPU."""
    if memory is None:
        count = torch.accelerator.device_count()
        found = {device_name(i): int(_FREE * torch.accelerator.get_memory_info(i)[0]) for i in range(count)}
        return found or {"cpu": None}  # type: ignore[return-value]
    if not memory:
        raise ValueError("max_memory: no device in it; give {device: bytes}")
    given = {device_name(device): None if size is None else parse_size(size) for device, size in memory.items()}
    return dict(sorted(given.items(), key=lambda each: each[0].split(":")[0] == "cpu"))
