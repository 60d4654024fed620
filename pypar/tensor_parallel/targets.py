"""From styles to cuts: checks that each style fits what it names, before anything is changed."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from pypar.tensor_parallel.cut import Cut, even_cut, packed_cut
from pypar.tensor_parallel.heads import (
    FUSED_BLOCKS,
    FUSED_GROUPS,
    KEY,
    QUERY,
    VALUE,
    Heads,
    heads_of,
)
from pypar.tensor_parallel.layout import check_targets
from pypar.tensor_parallel.linear import linear_shape
from pypar.tensor_parallel.shards import Place, shards_of
from pypar.tensor_parallel.styles import Style

_HEAD_NORMS = ("q_norm", "k_norm", "query_layernorm", "key_layernorm")


@dataclass(frozen=True)
class Target:
    """One module or parameter that changes. dim: of a parameter that is cut where it lies."""

    name: str
    style: Style
    cut: Cut | None = None
    dim: int | None = None

    @property
    def parent(self) -> str:
        return self.name.rpartition(".")[0]

    @property
    def leaf(self) -> str:
        return self.name.rpartition(".")[2]


def targets_of(module: nn.Module, styles: dict[str, Style], place: Place) -> tuple[list[Target], dict[str, Heads]]:
    """What changes, and the heads of each attention module among the parents."""
    modules = dict(module.named_modules(remove_duplicate=False))
    parameters = dict(module.named_parameters(remove_duplicate=False))
    by_parent: dict[str, dict[str, Style]] = defaultdict(dict)
    for name, style in styles.items():
        parent, _, leaf = name.rpartition(".")
        by_parent[parent][leaf] = style
    targets, all_heads = [], {}
    for parent, named in by_parent.items():
        heads = _heads(modules[parent], parent, named, place)
        if heads is not None:
            all_heads[parent] = heads
            targets += list(_norms(modules[parent], parent, named, heads))
        for leaf, style in named.items():
            name = f"{parent}.{leaf}" if parent else leaf
            if name in modules:
                targets.append(_module_target(name, modules[name], style, heads, place))
            else:
                targets.append(_parameter_target(name, parameters[name], style, heads, place))
    targets = [t for t in targets if t.style.kind != "leave"]
    if place.determinism == "layout":
        check_targets(targets, place.rank)
    return targets, all_heads


def _heads(parent: nn.Module, name: str, named: dict[str, Style], place: Place) -> Heads | None:
    """The heads that the plan cuts in this parent; None where it cuts none (or gathers them right away)."""
    cut = {n for n, s in named.items() if s.kind in ("column", "column_qkv") and not s.full_side}
    if not cut & {*QUERY, *KEY, *VALUE, *FUSED_BLOCKS, *FUSED_GROUPS}:
        return None
    children = dict(parent.named_children())
    heads = heads_of(parent, children, place.world_size, name or type(parent).__name__)
    if heads is not None:
        _check_output(name, children, named, heads)
    if heads is not None and cut & {*QUERY, *KEY, *VALUE}:
        left_out = [n for n in (*QUERY, *KEY, *VALUE) if n in children and n not in cut]
        if left_out:
            raise ValueError(
                f"{name}: the plan cuts {', '.join(sorted(cut))}, but not {', '.join(left_out)}; query, key and value "
                "of one attention are cut together ('colwise')"
            )
    return heads


def _check_output(name: str, children: dict[str, nn.Module], named: dict[str, Style], heads: Heads) -> None:
    """What reads the heads in this same module must read as many features as they make."""
    rows = {n: linear_shape(children[n]) for n, s in named.items() if s.kind == "row" and n in children}
    width = heads.num * heads.head_dim
    if rows and not any(shape is not None and shape[1] == width for shape in rows.values()):
        raise ValueError(
            f"{name}: {heads.num} query heads of {heads.head_dim} make {width} features, which none of "
            f"{', '.join(rows)} reads; name the projections 'colwise_gather_output' and 'rowwise_split_input'"
        )


def _module_target(name: str, module: nn.Module, style: Style, heads: Heads | None, place: Place) -> Target:
    if shards_of(module):
        raise ValueError(f"{name} is cut already: call pypar.tensor_parallel once, on the full model")
    kind = "vocab" if style.kind == "row" and isinstance(module, nn.Embedding) else style.kind
    if kind in ("shared", "experts", "reduce", "leave"):
        return Target(name, style)
    if kind == "vocab":
        if not isinstance(module, nn.Embedding):
            raise _unfit(name, module, style, "an nn.Embedding")
        what = f"{name}.num_embeddings"
        cut = even_cut(module.num_embeddings, place.world_size, what=what, determinism=place.determinism)
        return Target(name, Style("vocab"), cut)
    shape = linear_shape(module)
    if shape is None:
        raise _unfit(name, module, style, "an nn.Linear" + (" or nn.Embedding" if kind == "row" else ""))
    leaf = name.rpartition(".")[2]
    if kind == "row":
        if heads is not None and shape[1] == heads.num * heads.head_dim and not style.full_side:
            return Target(name, style, heads.query_cut())
        return Target(name, style, _features(shape[1], style, place, f"{name}.in_features"))
    if heads is not None and not style.full_side:
        if leaf in QUERY:
            return Target(name, style, heads.query_cut())
        if leaf in (*KEY, *VALUE):
            return Target(name, style, heads.kv_cut())
        if kind == "column_qkv":
            return Target(name, style, heads.blocks_cut())
        if leaf in FUSED_BLOCKS:
            raise ValueError(
                f"{name}: '{leaf}' holds query | key | value one behind the other, so that 'colwise' would give a rank "
                "pieces that don't belong together; use 'colwise_qkv'"
            )
        if leaf in FUSED_GROUPS:
            return Target(name, style, heads.groups_cut())
        if shape[0] in (heads.num * heads.head_dim, heads.num):  # gates and the like: one or a head of them per head
            width = shape[0] // heads.num
            return Target(name, style, Cut(shape[0], tuple(((a * width, b * width),) for a, b in heads.q)))
    if kind == "column_qkv":
        raise ValueError(f"{name}: 'colwise_qkv' needs an attention module whose heads are known; {module} is in none")
    return Target(name, style, _features(shape[0], style, place, f"{name}.out_features"))


def _features(full: int, style: Style, place: Place, what: str) -> Cut:
    if full % style.packed:
        raise ValueError(f"{what} = {full} isn't {style.packed} packed blocks")
    block = even_cut(full // style.packed, place.world_size, what=what, determinism=place.determinism)
    return packed_cut([block] * style.packed)


def _parameter_target(name: str, parameter: nn.Parameter, style: Style, heads: Heads | None, place: Place) -> Target:
    if style.kind == "leave" or (style.kind == "row" and parameter.dim() == 1):  # a bias added to the sum
        return Target(name, Style("leave"))
    if style.kind not in ("column", "row") or style.full_side or parameter.dim() == 0:
        raise ValueError(
            f"{name}: style '{style.kind}' doesn't fit a parameter of shape {tuple(parameter.shape)}; a parameter "
            "takes 'colwise', 'rowwise' and their packed forms"
        )
    dim = 0 if parameter.dim() == 1 else parameter.dim() - (2 if style.kind == "column" else 1)
    if heads is not None and parameter.shape[dim] == heads.num:
        return Target(name, style, Cut(heads.num, tuple((r,) for r in heads.q)), dim)
    return Target(name, style, _features(parameter.shape[dim], style, place, f"{name} dim {dim}"), dim)


def _norms(parent: nn.Module, name: str, named: dict[str, Style], heads: Heads) -> Iterator[Target]:
    """Norms of queries and keys, which see this rank's heads alone, whether the plan names them or not."""
    for leaf, norm in parent.named_children():
        if leaf not in _HEAD_NORMS or leaf in named:
            continue
        is_query = leaf.startswith("q")
        for parameter_name, parameter in norm.named_parameters():
            full = f"{name}.{leaf}.{parameter_name}"
            if parameter.shape == (heads.head_dim,):
                yield Target(f"{name}.{leaf}", Style("shared"))
                break
            if parameter.shape == (heads.num if is_query else heads.num_kv, heads.head_dim):
                ranges = heads.q if is_query else heads.kv
                yield Target(full, Style("column"), Cut(parameter.shape[0], tuple((r,) for r in ranges)), 0)
                continue
            raise ValueError(
                f"{full} {tuple(parameter.shape)} normalizes over all heads, of which a rank has its own only: name "
                "the projection 'colwise_gather_output' and the output 'rowwise_split_input'"
            )


def _unfit(name: str, module: nn.Module, style: Style, wanted: str) -> ValueError:
    return ValueError(f"{name} is {type(module).__name__}, which style '{style.kind}' doesn't fit; it takes {wanted}")
