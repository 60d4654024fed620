"""pypar.tensor_parallel: cuts a model in place for the ranks of a group, as a plan says."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.distributed_c10d import _resolve_process_group

from pypar.tensor_parallel.dropout import Inner, key_dropouts
from pypar.tensor_parallel.embedding import VocabParallelEmbedding
from pypar.tensor_parallel.foreign import cut_alibi, sum_parts, use_shared_parameters
from pypar.tensor_parallel.heads import Heads
from pypar.tensor_parallel.layout import use_dense_matmuls
from pypar.tensor_parallel.linear import ColumnParallelLinear, RowParallelLinear
from pypar.tensor_parallel.lora import cut_adapters, without_adapters
from pypar.tensor_parallel.loss import loss_head, use_loss_parallel
from pypar.tensor_parallel.plan import choose, log, resolve
from pypar.tensor_parallel.shards import Group, Place, Shard, cut_parameter, place_of
from pypar.tensor_parallel.shared import SharedInput
from pypar.tensor_parallel.stack import stacks_of, use_sequence_parallel
from pypar.tensor_parallel.styles import Style
from pypar.tensor_parallel.targets import Target, targets_of


def tensor_parallel(
    module: nn.Module,
    group: Group = None,
    plan: str | dict[str, Any] = "auto",
    *,
    sequence_parallel: bool = False,
    loss_parallel: bool = False,
    determinism: str = "run",
) -> nn.Module:
    """Cuts `module` in place so that the ranks of `group` hold and compute a part each; returns it.

    module   the full model, the same on every rank
    group    process group, its name, or a DeviceMesh of one dim; None: all ranks
    plan     {pattern: style}: "*" in a pattern stands for one part of a name; a style is one of Hugging Face's names
             (their base_model_tp_plan as it is), torch's ColwiseParallel or RowwiseParallel, or "colwise_qkv" for
             query | key | value in one weight. "auto": the model's own plan, else pairs of linears in attention and
             MLP by name and shape; logged as "pypar.tensor_parallel"
    sequence_parallel
             between the matmuls each rank computes and keeps its share of the tokens alone (norms, dropout, residuals);
             the layers' outputs are such shares, the model's output is full. Forwards of fewer than 48 tokens, and
             those that ask for output_hidden_states, run without it
    loss_parallel
             the last linear, which the plan would gather, gives this rank's columns of the logits, for
             pypar.VocabParallelCrossEntropy; a Hugging Face model's own loss (labels=) takes them so
    determinism
             "run": the same bits on every rank and in every run. "layout": also for 1, 2, 4 and 8 ranks, forward and
             backward, as far as the matmuls of the cut layers and what crosses ranks go; slower. What the model itself
             computes between them must not depend on the number of ranks: docs/design/0005-layout-determinism.md

    Every rank feeds the same batch and gets the same output. Parameters that stay whole get equal gradients on all
    ranks. Attention is cut on whole heads, with groups of query heads and their key and value head kept together; key
    and value heads fewer than ranks are held as copies, whose gradients are summed. Tied weights stay tied.

    Raises ValueError, with nothing changed: a pattern that names nothing, an unknown style, one that doesn't fit what
    it names, more ranks than heads, models that differ between ranks, a model that sequence_parallel doesn't fit,
    what determinism "layout" can't cut, "layout" with sequence_parallel.
    """
    if plan != "auto" and not isinstance(plan, dict):
        raise ValueError(f"plan={plan!r}: give 'auto' or {{pattern: style}}")
    base: nn.Module = getattr(module, "get_base_model", lambda: module)()  # of peft's model
    with without_adapters(base):
        _cut_model(base, place_of(group, determinism), plan, sequence_parallel, loss_parallel)
    cut_adapters(module)
    return module


def cut_for(
    module: nn.Module,
    place: Place,
    plan: str | dict[str, Any] = "auto",
    *,
    sequence_parallel: bool = False,
    loss_parallel: bool = False,
) -> None:
    """As tensor_parallel, for one rank of a group whose others aren't there: nothing is compared with theirs."""
    base: nn.Module = getattr(module, "get_base_model", lambda: module)()
    with without_adapters(base):
        _cut_model(base, place, plan, sequence_parallel, loss_parallel, compare=False)
    cut_adapters(module)


def _cut_model(
    module: nn.Module,
    place: Place,
    plan: str | dict[str, Any],
    sequence_parallel: bool,
    loss_parallel: bool,
    compare: bool = True,
) -> None:
    styles = _with_tied(module, choose(module) if isinstance(plan, str) else resolve(module, plan))
    targets, heads = targets_of(module, styles, place)
    if compare:
        _check_same_everywhere(module, targets, place)
    tied = _owners(module)
    _check_tied(tied, targets)
    sequence_parallel = sequence_parallel or any(s.sequence for s in styles.values())
    if sequence_parallel and place.determinism == "layout":
        raise ValueError(
            "determinism 'layout' with sequence parallel: the gradients of norms would add rows in an order that "
            "depends on the number of ranks; use one of them"
        )
    stacks = stacks_of(module, targets) if sequence_parallel else []
    head = loss_head(module, targets) if loss_parallel else None
    made: dict[int, nn.Module] = {}
    for target in targets:
        _apply(module, target, place, made)
    for name, its in heads.items():
        its.fix_counts(module.get_submodule(name), place.rank)
        cut_alibi(module.get_submodule(name), its, place.rank)
        if place.determinism == "layout":
            use_dense_matmuls(module.get_submodule(name))
    _tie(module, tied)
    _share_inputs(module, [t.name for t in targets if t.style.kind.startswith("column") and t.dim is None], place)
    forces = use_sequence_parallel(module, stacks, targets, place)
    if head is not None:
        use_loss_parallel(module, head)
    key_dropouts(module, _inner_parts(module, targets, heads, place), forces, place)


def check_plan(
    module: nn.Module,
    world_size: int,
    plan: str | dict[str, Any] = "auto",
    *,
    sequence_parallel: bool = False,
    loss_parallel: bool = False,
) -> None:
    """Raises the ValueError with which tensor_parallel would refuse this on world_size ranks; changes nothing.

    Needs neither process group nor weights: a module on the meta device will do.
    """
    styles = _with_tied(module, choose(module) if isinstance(plan, str) else resolve(module, plan))
    targets, _ = targets_of(module, styles, Place("", 0, world_size))
    _check_tied(_owners(module), targets)
    if sequence_parallel or any(s.sequence for s in styles.values()):
        stacks_of(module, targets)
    if loss_parallel:
        loss_head(module, targets)


def _apply(root: nn.Module, target: Target, place: Place, made: dict[int, nn.Module]) -> None:
    parent, kind, cut = root.get_submodule(target.parent), target.style.kind, target.cut
    if target.dim is not None:
        assert cut is not None
        cut_parameter(parent, target.leaf, Shard(target.dim, cut, place))
        if cut.has_copies():
            use_shared_parameters(parent, place)
        return
    old = parent.get_submodule(target.leaf)
    if kind == "shared":
        use_shared_parameters(old, place)
    elif kind in ("experts", "reduce"):
        sum_parts(old, place, full_input=kind == "experts")
    else:
        new = made.get(id(old))
        if new is not None:  # one module under two names stays one
            pass
        elif kind == "vocab":
            assert isinstance(old, nn.Embedding)
            new = VocabParallelEmbedding.from_embedding(old, place, cut=cut)
        elif kind == "row":
            new = RowParallelLinear.from_linear(old, place, cut=cut, split_input=target.style.full_side)
        else:
            new = ColumnParallelLinear.from_linear(old, place, cut=cut, gather_output=target.style.full_side)
        made[id(old)] = new
        made[id(new)] = new
        setattr(parent, target.leaf, new)


def _caller(root: nn.Module, name: str) -> str:
    """The nearest module above with a forward, which a ModuleList or ModuleDict hasn't."""
    above = name.rpartition(".")[0]
    while above and isinstance(root.get_submodule(above), (nn.ModuleList, nn.ModuleDict)):
        above = above.rpartition(".")[0]
    return above


def _inner_parts(root: nn.Module, targets: list[Target], heads: dict[str, Heads], place: Place) -> dict[str, Inner]:
    """Of the modules that call column or row layers: where between these their tensors are parts."""
    parts: dict[str, Inner] = {}
    for target in targets:
        kind, layer = target.style.kind, root.get_submodule(target.parent if target.dim is not None else target.name)
        if target.style.full_side or target.dim is not None or kind not in ("column", "column_qkv", "row"):
            continue
        assert target.cut is not None
        part = parts.setdefault(_caller(root, target.name), Inner(place))
        if kind == "row":
            part.cuts.insert(0, target.cut)
            layer.register_forward_hook(part.leave)
        else:
            part.cuts.append(target.cut)
            layer.register_forward_hook(part.enter)
    for name, its in heads.items():
        part = parts.setdefault(_caller(root, f"{name}.x"), Inner(place))
        part.heads = its
        part.cuts.insert(0, its.query_cut())
    return parts


def _share_inputs(root: nn.Module, columns: list[str], place: Place) -> None:
    """The column layers that one module's forward calls copy the tensor that they read once.

    What they share is cleared when that module is called.
    """
    callers: dict[nn.Module, list[ColumnParallelLinear]] = {}
    for name in columns:
        layer = root.get_submodule(name)
        assert isinstance(layer, ColumnParallelLinear)
        callers.setdefault(root.get_submodule(_caller(root, name)), []).append(layer)
    for caller, layers in callers.items():
        if len(layers) > 1:
            shared = SharedInput(layers[0].copy_in)
            shared.together = tuple(layers)
            shared.attach(caller)
            for layer in layers:
                layer.shared_input = shared


def _owners(module: nn.Module) -> list[list[tuple[str, str]]]:
    """The (module, parameter) names under which each parameter that has several is known."""
    owners: dict[int, list[tuple[str, str]]] = {}
    for name, submodule in module.named_modules():
        for parameter_name, parameter in submodule._parameters.items():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append((name, parameter_name))
    return [names for names in owners.values() if len(names) > 1]


def _with_tied(module: nn.Module, styles: dict[str, Style]) -> dict[str, Style]:
    """What shares its weight with something that is cut is cut the same way."""
    for names in _owners(module):
        cut = [n for n, _ in names if n in styles and styles[n].kind != "leave"]
        for name, _ in names if cut else []:
            if name in cut:
                continue
            submodule = module.get_submodule(name)
            if isinstance(submodule, nn.Embedding):
                styles[name] = Style("vocab")
            elif isinstance(submodule, nn.Linear):
                styles[name] = Style("column", full_side=True)
            else:
                raise ValueError(f"{cut[0]} is cut, but shares its weight with {name}, which isn't: name both or none")
            log.info("%s shares its weight with %s: cut the same way", name, cut[0])
    return styles


def _check_tied(tied: list[list[tuple[str, str]]], targets: list[Target]) -> None:
    by_name = {t.name: t for t in targets}
    for names in tied:
        cut = [by_name[n] for n, _ in names if n in by_name]
        if len({t.cut for t in cut}) > 1 or (len(cut) > 1 and not {t.style.kind for t in cut} <= {"vocab", "column"}):
            raise ValueError(
                f"{' and '.join(n for n, _ in names)} share one weight, but the plan cuts it differently: name them "
                "'embedding_rowwise' and 'colwise_gather_output', or none"
            )


def _tie(module: nn.Module, tied: list[list[tuple[str, str]]]) -> None:
    for names in tied:
        (first, first_name), *others = names
        owner = module.get_submodule(first)
        for name, parameter_name in others:
            module.get_submodule(name)._parameters[parameter_name] = owner._parameters[first_name]


def _check_same_everywhere(module: nn.Module, targets: list[Target], place: Place) -> None:
    """Ranks with another model or plan would wait for each other or sum what doesn't belong together."""
    facts = [f"{n} {tuple(p.shape)} {p.dtype} {p.requires_grad}" for n, p in module.named_parameters()]
    facts += [f"{t.name}: {t.style}" for t in targets] + [f"determinism '{place.determinism}'"]
    digest = int.from_bytes(hashlib.sha256("\n".join(facts).encode()).digest()[:7])
    device = next((p.device for p in module.parameters() if p.device.type != "meta"), torch.device("cpu"))
    sent = torch.tensor([digest, -digest], dtype=torch.int64, device=device)
    most, least = torch.ops.pypar.all_reduce(sent, "max", place.group_name).tolist()
    if most == -least:
        return
    everyone: list[Any] = [None] * place.world_size
    dist.all_gather_object(everyone, facts, group=_resolve_process_group(dist.GroupName(place.group_name)))
    other = next(r for r in range(place.world_size) if everyone[r] != everyone[0])
    differ = sorted(set(everyone[0]) ^ set(everyone[other])) or ["the order of the parameters"]
    raise ValueError(
        f"pypar.tensor_parallel: ranks 0 and {other} differ in {'; '.join(differ[:4])}; every rank passes the same "
        "full model and plan"
    )
