"""Model and optimizer as named tensors for safetensors, and back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from pypar.trainer.errors import TrainError

METADATA = {"format": "pt"}


def save_model(module: nn.Module, config: dict[str, Any], folder: Path) -> None:
    """model.safetensors and config.json, as transformers' from_pretrained reads them. Tied weights are stored once."""
    save_file(_unique(module), folder / "model.safetensors", metadata=METADATA)
    (folder / "config.json").write_text(json.dumps(config | {"architectures": [type(module).__name__]}, indent=1))


def load_model(module: nn.Module, folder: Path) -> None:
    """Copies the weights in place. Raises TrainError when names or shapes are another model's."""
    path = folder / "model.safetensors"
    wanted = _unique(module)
    with safe_open(path, framework="pt") as file:
        stored = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    shapes = {name: tuple(tensor.shape) for name, tensor in wanted.items()}
    if stored != shapes:
        name = min(name for name in stored.keys() | shapes.keys() if stored.get(name) != shapes.get(name))
        raise TrainError(
            f"checkpoint {folder} is of another model: {name} is {stored.get(name, 'absent')} there, "
            f"{shapes.get(name, 'absent')} here"
        )
    with torch.no_grad():
        for name, tensor in load_file(path).items():
            wanted[name].copy_(tensor)


def save_optimizer(optimizer: torch.optim.Optimizer, module: nn.Module, folder: Path) -> None:
    """optimizer.safetensors: `<state>.<parameter name>`, e.g. `exp_avg.lm_head.weight`."""
    tensors = {}
    for name, parameter in module.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{key}.{name}"] = value.detach().contiguous()
    save_file(tensors, folder / "optimizer.safetensors", metadata=METADATA)


def load_optimizer(optimizer: torch.optim.Optimizer, module: nn.Module, folder: Path) -> None:
    """Sets the state of every parameter; learning rates are the caller's."""
    parameters = dict(module.named_parameters())
    for full, tensor in load_file(folder / "optimizer.safetensors").items():
        key, _, name = full.partition(".")
        if name not in parameters:
            raise TrainError(f"checkpoint {folder} is of another model: it has optimizer state for {name}")
        parameter = parameters[name]
        # `step` stays where AdamW creates it: beside the parameter when fused.
        optimizer.state[parameter][key] = tensor.to(parameter.device)


def _unique(module: nn.Module) -> dict[str, torch.Tensor]:
    """The state dict without second names of the same memory."""
    kept: dict[str, torch.Tensor] = {}
    seen: set[tuple[int, tuple[int, ...]]] = set()
    for name, tensor in module.state_dict().items():
        key = (tensor.data_ptr(), tuple(tensor.shape))
        if key not in seen or not tensor.numel():
            seen.add(key)
            kept[name] = tensor.detach().contiguous()
    return kept
