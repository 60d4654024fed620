"""Model and optimizer as named tensors for safetensors, and back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from pypar.hybrid import HybridModel, gather_optimizer_state, gather_state, load_optimizer_state
from pypar.trainer.errors import TrainError, reason

METADATA = {"format": "pt"}


class Full:
    """The full tensors of model and optimizer.

    weights: by name, tied ones once. moments: `<state>.<parameter name>`, e.g. `exp_avg.lm_head.weight`.
    """

    @classmethod
    def of(cls, model: HybridModel, optimizer: torch.optim.Optimizer) -> Full | None:
        """On rank 0. Collective."""
        weights, states = gather_state(model), gather_optimizer_state(model, optimizer)
        if not weights:
            return None
        filled = next((state for state in states.values() if state), {})
        for name, shape in model.trained.items():  # one without elements, which no rank of ZeRO has a piece of
            if name not in states and 0 in shape and filled:
                empty = {k: v if k == "step" else torch.zeros(shape, dtype=v.dtype) for k, v in filled.items()}
                states[name] = empty
        return cls(type(model.module).__name__, weights, states, aliases=set(model.aliases))

    def __init__(
        self,
        architecture: str,
        weights: dict[str, torch.Tensor],
        states: dict[str, dict[str, torch.Tensor]],
        aliases: set[str] | None = None,
    ):
        self.architecture = architecture
        self.weights = {name: t.contiguous() for name, t in weights.items() if name not in (aliases or ())}
        self.moments = {
            f"{key}.{name}": value.detach().contiguous()
            for name, state in states.items()
            for key, value in state.items()
        }


def save_model(full: Full, config: dict[str, Any], folder: Path) -> None:
    """model.safetensors and config.json, as transformers' from_pretrained reads them."""
    save_file(full.weights, folder / "model.safetensors", metadata=METADATA)
    (folder / "config.json").write_text(json.dumps(config | {"architectures": [full.architecture]}, indent=1))


def load_model(module: nn.Module, folder: Path) -> None:
    """Copies the weights into the full module. Raises TrainError when names or shapes are another model's."""
    path = folder / "model.safetensors"
    wanted = _unique(module.state_dict())
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


def save_optimizer(full: Full, folder: Path) -> None:
    """optimizer.safetensors"""
    save_file(full.moments, folder / "optimizer.safetensors", metadata=METADATA)


def load_optimizer(model: HybridModel, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """Sets the state of this rank's part of every parameter; learning rates are the caller's."""
    states: dict[str, dict[str, torch.Tensor]] = {}
    for full, tensor in load_file(folder / "optimizer.safetensors").items():
        key, _, name = full.partition(".")
        states.setdefault(name, {})[key] = tensor
    try:
        load_optimizer_state(model, optimizer, states)
    except ValueError as error:
        raise TrainError(f"checkpoint {folder} is of another model: {reason(error, with_type=False)}") from error


def _unique(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The state dict without second names of the same memory."""
    kept: dict[str, torch.Tensor] = {}
    seen: set[tuple[int, tuple[int, ...]]] = set()
    for name, tensor in state.items():
        key = (tensor.data_ptr(), tuple(tensor.shape))
        if key not in seen or not tensor.numel():
            seen.add(key)
            kept[name] = tensor.detach().contiguous()
    return kept
