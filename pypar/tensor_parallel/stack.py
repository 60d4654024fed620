"""Finds the stacks of decoder layers in a cut model, and puts the hooks of sequence.py where they belong."""

from __future__ import annotations

from torch import nn

from pypar.tensor_parallel.heads import FUSED_BLOCKS, FUSED_GROUPS, KEY, QUERY, VALUE
from pypar.tensor_parallel.linear import ColumnParallelLinear, RowParallelLinear
from pypar.tensor_parallel.plan import log
from pypar.tensor_parallel.sequence import (
    ByRow,
    LayerHooks,
    OnFull,
    ReadsAllRows,
    RowsInForce,
    StackHooks,
    uncut,
)
from pypar.tensor_parallel.shards import Place
from pypar.tensor_parallel.targets import Target

# What a model calls with the last layer's output, by name; else the last layer gathers.
_FINAL_NORMS = ("norm", "ln_f", "final_layer_norm", "final_layernorm", "final_norm", "norm_f", "ln_out")
_HEADS = {*QUERY, *KEY, *VALUE, *FUSED_BLOCKS, *FUSED_GROUPS}


Stack = tuple[str, list[nn.Module]]


def stacks_of(root: nn.Module, targets: list[Target]) -> list[Stack]:
    """(name of the list, its layers) of every list whose layers all have parts that are cut; the outermost ones.

    Raises ValueError where there is none, or none that sequence parallel fits.
    """
    names = [t.name for t in targets]
    stacks: list[Stack] = []
    for name, module in root.named_modules():
        if not isinstance(module, (nn.ModuleList, nn.Sequential)) or not len(module):
            continue
        layers = [f"{name}.{n}" for n, _ in module.named_children()]
        if any(name.startswith(f"{other}.") for other, _ in stacks) or not all(
            any(n.startswith(f"{layer}.") for n in names) for layer in layers
        ):
            continue
        bare = [n for n in names if n.rpartition(".")[0] in layers and n.rpartition(".")[2] in _HEADS]
        if bare:
            raise ValueError(
                f"sequence_parallel=True: {bare[0]} stands in its layer, whose forward would see a part of the rows "
                "where it splits heads; put the attention into a module of its own, or use sequence_parallel=False"
            )
        stacks.append((name, list(module.children())))
    if not stacks:
        raise ValueError(
            f"sequence_parallel=True found no list of layers with parts that the plan cuts in {type(root).__name__}: "
            "use sequence_parallel=False"
        )
    return stacks


def use_sequence_parallel(
    root: nn.Module, stacks: list[Stack], targets: list[Target], place: Place
) -> dict[str, RowsInForce]:
    """Puts the hooks there; of each stack, by name, what says how its rows lie."""
    return {n: _attach(root, n, layers, targets, place) for n, layers in (stacks if place.world_size > 1 else [])}


def _attach(root: nn.Module, name: str, layers: list[nn.Module], targets: list[Target], place: Place) -> RowsInForce:
    owner_name = name.rpartition(".")[0]
    owner = root.get_submodule(owner_name)
    final = next((n for n in _FINAL_NORMS if _is_norm(getattr(owner, n, None))), None)
    owners: list[tuple[nn.Module, str]] = []
    force = RowsInForce(place, owners)
    modules = {id(m): n for n, m in root.named_modules(remove_duplicate=False)}
    kinds: dict[str, str] = {}
    for index, layer in enumerate(layers):
        layer_name = modules[id(layer)]
        for child_name, child in layer.named_children():
            kinds[child_name] = _attach_part(child, f"{layer_name}.{child_name}", targets, force)
        owners += [(layer, n) for n in uncut(layer)]
        LayerHooks(force, layer_name, index == 0, final is None and index == len(layers) - 1, uncut(layer)).attach(
            layer
        )
    if final is not None:
        norm = owner.get_submodule(final)
        owners += [(norm, n) for n in uncut(norm)]
        ByRow(force, uncut(norm), final=True).attach(norm)
    StackHooks(force, owner_name).attach(owner)
    log.info("%s: sequence parallel, gathered by %s; in a layer %s", name, final or "the last layer", kinds)
    return force


def _attach_part(part: nn.Module, name: str, targets: list[Target], force: RowsInForce) -> str:
    """What a child of a layer becomes, in a word for the log."""
    inside = [t for t in targets if t.name == name or t.name.startswith(f"{name}.")]
    if isinstance(part, ColumnParallelLinear):
        part.force, part.reads_rows = force, True
        return "reads all rows"
    if isinstance(part, RowParallelLinear):
        _scatter(part, force)
        return "scatters"
    if not inside:
        if _is_by_row(part):
            names = uncut(part)
            force.owners += [(part, n) for n in names]
            ByRow(force, names).attach(part)
            return "by row"
        OnFull(force, name).attach(part)
        return "on full tensors"
    holder = _regular(part, name, inside)
    if holder is None:
        OnFull(force, name).attach(part)
        return "on full tensors"
    ReadsAllRows(force, name).attach(holder)
    for child in holder.children():
        if isinstance(child, ColumnParallelLinear):
            child.force = force
        elif isinstance(child, RowParallelLinear):
            _scatter(child, force)
    return "reads all rows, scatters"


def _scatter(row: RowParallelLinear, force: RowsInForce) -> None:
    row.force = force
    if row.bias is not None:
        force.owners.append((row, "bias"))


def _regular(part: nn.Module, name: str, inside: list[Target]) -> nn.Module | None:
    """The module whose own children are all that is cut in `part`: columns and one row-parallel layer at the end."""
    if not all(t.style.kind.startswith("column") or t.style.kind in ("row", "shared") for t in inside):
        return None
    parents = {t.parent for t in inside if t.style.kind != "shared"}
    if len(parents) != 1 or any(t.dim is not None and t.style.kind != "shared" for t in inside if t.parent in parents):
        return None
    holder = part
    for step in parents.pop().removeprefix(name).strip(".").split("."):
        if step:
            others = [m for n, m in holder.named_children() if n != step and any(True for _ in m.parameters())]
            if others or holder._parameters:
                return None
            holder = holder.get_submodule(step)
    rows = [m for m in holder.children() if isinstance(m, RowParallelLinear)]
    columns = [m for m in holder.children() if isinstance(m, ColumnParallelLinear)]
    return holder if len(rows) == 1 and columns else None


def _is_norm(module: object) -> bool:
    return (
        isinstance(module, nn.Module)
        and type(module).__name__.endswith("Norm")
        and not list(module.children())
        and all(p.dim() == 1 for p in module.parameters())
    )


def _is_by_row(part: nn.Module) -> bool:
    return (
        _is_norm(part) or type(part) is nn.Linear or not (any(True for _ in part.parameters()) or list(part.children()))
    )
