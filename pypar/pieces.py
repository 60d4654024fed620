"""Blocks that can be cut inside: their children in the order in which the block calls them, read from its source."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator

from torch import nn


def pieces_of(block: nn.Module) -> list[tuple[str, nn.Module]]:
    """The children of a block that hold parameters, in the order in which its forward calls them, where it calls each
    on one line of its code and holds no parameter itself; else nothing. Nothing is run."""
    children = {name: child for name, child in block.named_children() if any(True for _ in child.parameters())}
    ids = [id(parameter) for child in children.values() for parameter in child.parameters()]
    if any(True for _ in block.parameters(recurse=False)) or len(set(ids)) < len(ids):
        return []
    if isinstance(block, nn.Sequential):
        return list(children.items())
    named = [name for name in _calls(type(block)) if name in children]
    return [(name, children[name]) for name in named] if sorted(named) == sorted(children) else []


def _calls(kind: type[nn.Module]) -> list[str]:
    """x of every self.x(...) in the forward, in the order in which they run where there are no loops and branches."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(kind.forward))))
    except (OSError, TypeError, SyntaxError):  # no source, or code that is no function of its own
        return []
    return list(_ordered(tree))


def _ordered(node: ast.AST) -> Iterator[str]:
    """Arguments before the call that takes them, values before the names that they are given."""
    fields = [node.value, *node.targets] if isinstance(node, ast.Assign) else list(ast.iter_child_nodes(node))
    if isinstance(node, ast.Call):
        is_own = isinstance(node.func, ast.Attribute) and isinstance(node.func.value, ast.Name)
        for field in [*node.args, *node.keywords] if is_own else fields:
            yield from _ordered(field)
        if is_own and node.func.value.id == "self":  # type: ignore[attr-defined]
            yield node.func.attr  # type: ignore[attr-defined]
        return
    for field in fields:
        yield from _ordered(field)
