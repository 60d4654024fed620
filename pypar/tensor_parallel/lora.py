"""LoRA adapters of peft on parallel layers.

    y = base(x) + lora_B(lora_A(dropout(x))) * scaling

A column layer's adapter: x and lora_A are full, lora_B is cut as the layer's output. A row layer's: lora_A is cut as
the layer's input, its output summed over the ranks, and lora_B is full. So base and adapter give the same part of y,
and full adapter weights get full gradients, equal on all ranks. Found by what they have, not by type: peft is not
imported.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from pypar.tensor_parallel.dropout import Dropouts, Inner, Site
from pypar.tensor_parallel.embedding import VocabParallelEmbedding
from pypar.tensor_parallel.linear import ColumnParallelLinear, RowParallelLinear
from pypar.tensor_parallel.sequence import ByRow, RowsInForce
from pypar.tensor_parallel.shards import Place


def lora_layers(root: nn.Module) -> dict[str, Any]:
    """{name: layer} of peft's LoRA layers, those around an embedding included."""
    return {
        n: m
        for n, m in root.named_modules()
        if isinstance(getattr(m, "base_layer", None), nn.Module) and isinstance(getattr(m, "lora_A", None), nn.Module)
    }


@contextmanager
def without_adapters(root: nn.Module) -> Iterator[None]:
    """The model as if it had no adapters: base layers stand under their own names, and may be replaced there."""
    layers = lora_layers(root)
    for name, layer in layers.items():
        _set(root, name, layer.base_layer)
    try:
        yield
    finally:
        for name, layer in layers.items():
            layer.base_layer = root.get_submodule(name)
            _set(root, name, layer)


def _set(root: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(root.get_submodule(parent), leaf, module)


def cut_adapters(module: nn.Module) -> nn.Module:
    """Cuts peft's LoRA adapters to the parts that the ranks have of the layers below them; returns `module`.

    For adapters that were added to a model after pypar.tensor_parallel: call it before the optimizer is made, and again
    after each add_adapter. pypar.tensor_parallel does it for those that are there already. A collective call: the
    adapters' weights become those of rank 0, whatever the other ranks drew.

    Raises ValueError, naming the layer: a variant of LoRA that looks at the whole weight (DoRA and the like).
    """
    layers = lora_layers(module)
    for name, layer in layers.items():
        if getattr(layer.base_layer, "full_padding_idx", None) is not None and layer.lora_embedding_A:
            raise ValueError(
                f"{name}: LoRA on an embedding that is cut and has a padding_idx would train its adapter differently "
                "on each rank: leave the embedding out of the plan or of target_modules"
            )
        if isinstance(layer.base_layer, (ColumnParallelLinear, RowParallelLinear)) and getattr(
            layer, "lora_variant", None
        ):
            raise ValueError(
                f"{name}: {', '.join(type(v).__name__ for v in layer.lora_variant.values())} on a parallel layer needs "
                "weights that no rank has whole; use plain LoRA"
            )
    dropouts = next((d for m in module.modules() if (d := m.__dict__.get("_pypar_dropouts")) is not None), None)
    for name, layer in layers.items():
        for adapter in layer.lora_A:
            _cut(name, layer, adapter, dropouts)
        if isinstance(layer.base_layer, VocabParallelEmbedding) and layer.lora_embedding_A:
            # Full on every rank, as the ids and the embeddings are.
            _agree([*layer.lora_embedding_A.values(), *layer.lora_embedding_B.values()], layer.base_layer.place)
    return module


def _cut(name: str, layer: Any, adapter: str, dropouts: Dropouts | None) -> None:
    base, a, b = layer.base_layer, layer.lora_A[adapter], layer.lora_B[adapter]
    if isinstance(a, RowParallelLinear) or isinstance(b, ColumnParallelLinear):
        return  # it is cut already
    inner = None
    if isinstance(base, (ColumnParallelLinear, RowParallelLinear)):
        layer.fan_in_fan_out = base.transposed  # so that merging adds it the right way round
        _agree([*a.parameters(), *b.parameters()], base.place)
    if isinstance(base, ColumnParallelLinear):
        layer.lora_B[adapter] = ColumnParallelLinear.from_linear(
            b, base.place, cut=base.cut, gather_output=base.gather_output
        )
    elif isinstance(base, RowParallelLinear):
        layer.lora_A[adapter] = cut = RowParallelLinear.from_linear(
            a, base.place, cut=base.cut, split_input=base.split_input
        )
        if base.force is not None:  # what is scattered: this rank's rows
            cut.force = base.force
            _by_row(b, base.force)
        if not base.split_input:
            inner = Inner(base.place)
            inner.cuts, inner.inside = [base.cut], True
    else:
        for hook in list(base._forward_pre_hooks.values()):
            owner = getattr(hook, "__self__", None)
            if isinstance(owner, ByRow):
                _by_row(a, owner.force)
                _by_row(b, owner.force)
    if dropouts is not None:
        force = getattr(base, "force", None)
        dropout = layer.lora_dropout[adapter]
        dropouts.watch(dropout)
        Site(dropouts, f"{name}.lora_dropout.{adapter}", inner, force).attach(dropout)


def _by_row(linear: nn.Module, force: RowsInForce) -> None:
    names = [n for n, p in linear._parameters.items() if p is not None]
    force.owners += [(linear, n) for n in names]
    ByRow(force, names).attach(linear)


def _agree(parameters: list[nn.Parameter], place: Place) -> None:
    with torch.no_grad():
        for parameter in parameters:
            torch.ops.pypar.broadcast_(parameter.data, 0, place.group_name)
