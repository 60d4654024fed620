"""A plan, {pattern: style}: what it names in a module, and what "auto" chooses where the module has none."""

from __future__ import annotations

import fnmatch
import logging
from typing import Any

from torch import nn

from pypar.tensor_parallel.heads import FUSED_BLOCKS, FUSED_GROUPS, KEY, QUERY, VALUE
from pypar.tensor_parallel.linear import linear_shape
from pypar.tensor_parallel.styles import Style, style_of

log = logging.getLogger("pypar.tensor_parallel")

_OUTPUT = ("o_proj", "out_proj", "dense", "c_proj", "wo", "o", "out_lin")


def _matches(name: str, pattern: str) -> bool:
    """Dot by dot; "*" stands for one part of the name."""
    parts, wanted = name.split("."), pattern.split(".")
    return len(parts) == len(wanted) and all(fnmatch.fnmatchcase(p, w) for p, w in zip(parts, wanted, strict=True))


def resolve(module: nn.Module, plan: dict[str, Any], must_match: bool = True) -> dict[str, Style]:
    """{name of a module or parameter: style}; the last pattern that names it counts.

    Patterns may leave out the prefix of the base model, as Hugging Face's base_model_tp_plan does.
    """
    names = [n for n, _ in module.named_modules(remove_duplicate=False) if n]
    names += [n for n, _ in module.named_parameters(remove_duplicate=False)]
    prefix = getattr(module, "base_model_prefix", "")
    found: dict[str, Style] = {}
    for pattern, given in plan.items():
        style = style_of(given, pattern)
        hits = [n for n in names if _matches(n, pattern)]
        if not hits and prefix:
            hits = [n for n in names if _matches(n, f"{prefix}.{pattern}")]
        if not hits:
            text = f"plan['{pattern}'] names no module or parameter of {type(module).__name__}"
            if must_match:
                raise ValueError(f"{text}; it has {_some(names)} (* stands for one part of a name)")
            log.info("%s: left out", text)
        found.update(dict.fromkeys(hits, style))
    return found


def _some(names: list[str], limit: int = 12) -> str:
    """A few names that say most: layers by number are folded into *."""
    folded = list(dict.fromkeys(".".join("*" if p.isdigit() else p for p in n.split(".")) for n in names))
    leaves = [
        n for n in folded if not any(o.startswith(n + ".") and not o.endswith((".weight", ".bias")) for o in folded)
    ]
    leaves = [n for n in leaves if not n.endswith((".weight", ".bias"))] or folded
    return ", ".join(leaves[:limit]) + (", ..." if len(leaves) > limit else "")


def choose(module: nn.Module) -> dict[str, Style]:
    """The plan "auto": the model's own if it has one, else what the names and shapes of its linears say."""
    own = getattr(module, "_tp_plan", None) or getattr(getattr(module, "config", None), "base_model_tp_plan", None)
    if own:
        log.info("%s: its own plan %s", type(module).__name__, dict(own))
        return resolve(module, dict(own), must_match=False)
    found: dict[str, Style] = {}
    for name, parent in module.named_modules():
        children = {n: child for n, child in parent.named_children() if linear_shape(child) is not None}
        pair = _attention(children) or _mlp(children)
        if pair:
            found |= {f"{name}.{child}" if name else child: style_of(style, child) for child, style in pair.items()}
    if not found:
        raise ValueError(
            f"plan='auto' found no attention or MLP in {type(module).__name__}; give a plan: {{pattern: style}}"
        )
    names = {id(m): n for n, m in module.named_modules()}
    for getter, kind in (("get_input_embeddings", "vocab"), ("get_output_embeddings", "column")):
        end = getattr(module, getter, lambda: None)()
        if end is not None and id(end) in names:
            found[names[id(end)]] = Style(kind, full_side=kind == "column")
    log.info("%s: plan by names and shapes %s", type(module).__name__, {n: s.kind for n, s in found.items()})
    return found


def _attention(children: dict[str, nn.Module]) -> dict[str, str] | None:
    output = [n for n in _OUTPUT if n in children]
    if not output:
        return None
    separate = [next((n for n in names if n in children), None) for names in (QUERY, KEY, VALUE)]
    if all(separate):
        return {**{n: "colwise" for n in separate if n}, output[0]: "rowwise"}
    for name in (*FUSED_BLOCKS, *FUSED_GROUPS):
        if name in children:
            return {name: "colwise_qkv" if name in FUSED_BLOCKS else "colwise", output[0]: "rowwise"}
    return None


def _mlp(children: dict[str, nn.Module]) -> dict[str, str] | None:
    """One linear that leads from the inner to the outer width, and one or more the other way."""
    shapes = {n: shape for n, child in children.items() if (shape := linear_shape(child)) is not None}
    for down, (outer, inner) in shapes.items():
        ups = [n for n in shapes if n != down]
        if outer < inner and ups and all(shapes[n] == (inner, outer) for n in ups):
            return {**dict.fromkeys(ups, "colwise"), down: "rowwise"}
    return None
