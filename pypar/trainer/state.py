"""Model and optimizer as named tensors for safetensors, and back."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from pypar.tensor_parallel import gather_full_optimizer_state, gather_full_state, load_full_optimizer_state
from pypar.trainer.errors import TrainError, reason

METADATA = {"format": "pt"}


class Full:
    """The full tensors of model and optimizer, whatever part of the module this rank holds.

    weights: by name, tied ones once. moments: `<state>.<parameter name>`, e.g. `exp_avg.lm_head.weight`.
    """

    @classmethod
    def of(cls, module: nn.Module, optimizer: Any, is_cut: bool) -> Full:
        """is_cut: by tensor parallel; then a collective call of its group. Else the tensors are the module's own.
        optimizer: whose `state` has the moments by parameter."""
        if is_cut:
            states = gather_full_optimizer_state(module, optimizer)
        else:
            states = {name: optimizer.state.get(p, {}) for name, p in module.named_parameters()}
        return cls(type(module).__name__, gather_full_state(module) if is_cut else module.state_dict(), states)

    def __init__(self, architecture: str, weights: dict[str, torch.Tensor], states: dict[str, dict[str, torch.Tensor]]):
        self.architecture = architecture
        self.weights = _unique(weights)
        self.moments = {
            f"{key}.{name}": value.detach().contiguous()
            for name, state in states.items()
            for key, value in state.items()
        }


def unsharded(module: nn.Module, states: dict[str, dict[str, torch.Tensor]]) -> Any:
    """States of ZeRO's shards, gathered by name, in the form of the whole module's optimizer: `state`, by parameter.
    A parameter without elements, which no rank has a piece of, gets the empty states that it would have."""
    with_all = next((s for s in states.values() if s), {})
    found = {}
    for name, parameter in module.named_parameters():
        state = states.get(name, {})
        if not state and parameter.requires_grad and not parameter.numel():
            state = {k: v if k == "step" else torch.zeros_like(parameter) for k, v in with_all.items()}
        found[parameter] = state
    return SimpleNamespace(state=found)


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


States = dict[str, dict[str, torch.Tensor]]


def load_optimizer(
    optimizer: torch.optim.Optimizer,
    module: nn.Module,
    folder: Path,
    borrow: bool = False,
    part_of: Callable[[States], States] | None = None,
) -> None:
    """Sets the state of every parameter, or of this rank's part of it; learning rates are the caller's.

    borrow: the tensors stay in the mapped file, for a caller that copies what it needs; of a module that is not cut.
    part_of: chooses the states of the parameters that a module holds some of.
    """
    states: dict[str, dict[str, torch.Tensor]] = {}
    for full, tensor in load_file(folder / "optimizer.safetensors").items():
        key, _, name = full.partition(".")
        states.setdefault(name, {})[key] = tensor
    if part_of is not None:
        states = part_of(states)
    try:
        if borrow or part_of is not None:
            optimizer.state.update(_by_parameter(module, states))
        else:
            load_full_optimizer_state(module, optimizer, states)
    except ValueError as error:
        raise TrainError(f"checkpoint {folder} is of another model: {reason(error, with_type=False)}") from error


def _by_parameter(
    module: nn.Module, states: dict[str, dict[str, torch.Tensor]]
) -> dict[torch.Tensor, dict[str, torch.Tensor]]:
    named = dict(module.named_parameters())
    for name, state in states.items():
        if name not in named:
            raise ValueError(f"optimizer state for {name}, which is no parameter of {type(module).__name__}")
        for key, value in state.items():
            if value.dim() and value.shape != named[name].shape:
                raise ValueError(f"{key} of {name} is {tuple(value.shape)}, the parameter {tuple(named[name].shape)}")
    return {named[name]: state for name, state in states.items()}


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
