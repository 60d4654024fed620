"""ModelParallel: the module that users see."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from pypar.model_parallel.devices import Device, device_name, real_device
from pypar.model_parallel.moves import Traveller, put
from pypar.model_parallel.plan import Placement, place
from pypar.model_parallel.ranks import place_on_ranks
from pypar.model_parallel.rules import tensors_of
from pypar.pipeline_parallel import Pipeline
from pypar.pipeline_parallel.batch import Caller, Losses, LossFn

logger = logging.getLogger("pypar.model_parallel")


class ModelParallel(nn.Module):
    """Model parallel: layers, and parts of layers, on several devices; activations move between them as they pass,
    forward and backward.

    module         is placed in place: its parameters and buffers move, its state_dict keeps its names
    device_map     "auto"; a budget {device: bytes or "10GiB" or None}, for "auto"; a device for the whole model; or
                   {pattern: device}: 'model.layers.*' covers what it matches and all inside, the last match counts, ''
                   is the default. Devices are 'cpu', 'cuda:1', a torch.device, or 1 for an accelerator
    group          one device per rank instead: rank r of it takes the r-th run of blocks, devices are ranks 0, 1, ...
                   (or 'rank:1'). Every rank passes the same full model and the same batches. It is a pypar.Pipeline
                   with one micro-batch; use train_step
    max_memory     budget of "auto", limit of a map; default what is free on the accelerators, without any the CPU
    no_split       names of classes that "auto" keeps whole, everything else it may cut; default the entries of lists,
                   modules without lists inside, and Hugging Face's _no_split_modules
    costs          {name: cost}, such as pypar.model_parallel.measure() gives; default elements of matrices
    copies         a trainable weight counts so many times against a budget: 1 as it is, 4 with its gradient and the
                   two states of AdamW
    output_device  of what forward returns: "inputs" (where the first tensor among the inputs is), "last" (where the
                   model made it), or a device

    Tied weights lie on one device (with group= on every rank that uses them, with summed gradients). A value that is
    needed on two devices moves once to each. Values move in dicts, lists, tuples, dataclasses and Hugging Face outputs;
    what isn't a tensor is handed on untouched.
    Raises ValueError for a map that doesn't fit the model, a device that isn't here, or a budget that is too small.
    Source: the device maps of Hugging Face accelerate; Krizhevsky 2014, Dean et al. 2012 for the method.
    """

    def __init__(
        self,
        module: nn.Module,
        device_map: str | Mapping[Any, Any] = "auto",
        *,
        group: dist.ProcessGroup | None = None,
        max_memory: Mapping[Device, int | str | None] | None = None,
        no_split: Iterable[str] | None = None,
        costs: Mapping[str, float] | None = None,
        copies: int = 1,
        output_device: Device = "inputs",
    ):
        super().__init__()
        self.pipeline: Pipeline | None
        object.__setattr__(self, "pipeline", None)  # no submodule: parameters have one name
        if group is not None:
            if no_split is not None or output_device != "inputs":
                raise ValueError("with group= blocks stay whole and every rank gets the outputs: leave no_split and "
                                 "output_device out")  # fmt: skip
            world_size = dist.get_world_size(group)
            self.placement, counts = place_on_ranks(module, world_size, device_map, max_memory, costs, copies)
            pipeline = Pipeline(module, group, schedule="gpipe", micro_batches=1, split=counts)
            object.__setattr__(self, "pipeline", pipeline)
        else:
            self.placement = place(
                module, device_map, max_memory=max_memory, no_split=no_split, costs=costs, copies=copies
            )
            devices = {name: real_device(name) for name in self.placement.budget}
            if output_device not in ("inputs", "last"):
                output_device = real_device(device_name(output_device))
            _check_values(module, devices, self.placement)
            by_id = {id(t): devices[self.placement.tensors[n]] for n, t in tensors_of(module).items()}
            self._traveller = Traveller(module, put(module, by_id), output_device)
        self.module = module
        logger.info("%s:\n%s", type(module).__name__, self.table())

    @property
    def device_map(self) -> dict[str, str]:
        """{name: device} of the largest modules that lie on one device; as device_map it gives this placement again."""
        return self.placement.device_map

    @property
    def traffic(self) -> dict[tuple[str, str], tuple[int, int]]:
        """{(from, to): (moves, bytes)} of the last forward; empty with group=."""
        return {} if self.pipeline is not None else dict(self._traveller.moves.traffic)

    def table(self) -> str:
        """The placement with bytes and cost per device."""
        return self.placement.table()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's output; with group= without gradient, on every rank."""
        if self.pipeline is not None:
            return self.pipeline(*args, **kwargs)
        return self.module(*args, **kwargs)

    def train_step(self, batch: Any, loss_fn: LossFn | None = None) -> torch.Tensor:
        """Forward and backward of a batch; the mean loss. Gradients add up until zero_grad.

        batch    a pair (inputs, targets): the model gets the inputs and loss_fn(output, targets); or a dict: the model
                 gets the keys that its forward names, and loss_fn(output, batch)
        loss_fn  returns a mean or (sum, count); None: the causal language-model loss of batch["labels"]
        """
        if self.pipeline is not None:
            return self.pipeline.train_step(batch, loss_fn)
        losses = Losses.of(batch, loss_fn)
        loss = losses.add(Caller(self.module)(batch), batch)
        (loss * losses.scale).backward()
        return torch.tensor(losses.mean)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The module's, under its own names; with group= of this rank's blocks (full_state_dict has all)."""
        return self.module.state_dict(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return self.module.load_state_dict(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        """What it hasn't itself the pipeline has (clip_grad_norm_, full_state_dict, ...) or the module (generate,
        config, ...)."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            inner = self.__dict__.get("pipeline") or self._modules.get("module")
            if inner is None:
                raise
            return getattr(inner, name)


def _check_values(module: nn.Module, devices: Mapping[str, torch.device], placement: Placement) -> None:
    for name, tensor in tensors_of(module).items():
        if tensor.is_meta and devices[placement.tensors[name]].type != "meta":
            raise ValueError(
                f"'{name}' has no values yet (it is on 'meta'): load the model first, or plan with "
                "pypar.model_parallel.place"
            )
