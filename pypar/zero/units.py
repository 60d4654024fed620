"""What is gathered, reduced and freed together: a unit is a module with the parameters that no unit inside it has."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import nn

Rule = str | Iterable[Any] | Callable[[nn.Module], bool]


@dataclass
class Unit:
    """names: of its parameters, as the whole module has them; a tied parameter counts once, for the unit that holds all
    of its owners."""

    name: str
    module: nn.Module
    names: list[str] = field(default_factory=list)
    parameters: list[nn.Parameter] = field(default_factory=list)


def units_of(root: nn.Module, rule: Rule = "auto") -> list[Unit]:
    """The units of `root` in the order of registration; the first is the root's own.

    rule   "auto": the entries of every outermost nn.ModuleList or nn.Sequential that hold parameters; names or
           classes of modules (strings and types may be mixed); or a function that says of a module whether it is one

    Raises ValueError: a name or class that no module has.
    """
    chosen = _chosen(root, rule)
    units = [Unit("", root)] + [Unit(name, module) for name, module in chosen]
    owners: dict[int, list[str]] = {}
    named: dict[int, tuple[str, nn.Parameter]] = {}
    for name, parameter in root.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
        named.setdefault(id(parameter), (name, parameter))
    for key, (name, parameter) in named.items():
        homes = {_home(units, each) for each in owners[key]}
        unit = units[homes.pop() if len(homes) == 1 else 0]  # shared between units: the root's
        unit.names.append(name)
        unit.parameters.append(parameter)
    return [unit for unit in units if unit.parameters]


def _home(units: list[Unit], parameter_name: str) -> int:
    """The innermost unit around a parameter."""
    inside = [i for i, unit in enumerate(units) if not unit.name or parameter_name.startswith(f"{unit.name}.")]
    return max(inside, key=lambda i: len(units[i].name))


def _chosen(root: nn.Module, rule: Rule) -> list[tuple[str, nn.Module]]:
    modules = [(n, m) for n, m in root.named_modules() if n]
    if callable(rule) and not isinstance(rule, type):
        return [(n, m) for n, m in modules if rule(m)]
    if isinstance(rule, str):
        if rule != "auto":
            raise ValueError(f"units={rule!r}: give 'auto', names and classes of modules, or a function")
        found: list[tuple[str, nn.Module]] = []
        if isinstance(root, (nn.ModuleList, nn.Sequential)):
            return [(n, m) for n, m in root.named_children() if any(True for _ in m.parameters())]
        for name, module in modules:
            if isinstance(module, (nn.ModuleList, nn.Sequential)) and not any(
                name == outer or name.startswith(f"{outer}.") for outer, _ in found
            ):
                found += [
                    (f"{name}.{child_name}", child)
                    for child_name, child in module.named_children()
                    if any(True for _ in child.parameters())
                ]
        return found
    wanted = [rule] if isinstance(rule, type) else list(rule)
    for each in wanted:
        if not any(_is(n, m, each) for n, m in modules):
            raise ValueError(f"units: no module of {type(root).__name__} is {each!r}")
    return [(n, m) for n, m in modules if any(_is(n, m, each) for each in wanted)]


def _is(name: str, module: nn.Module, wanted: Any) -> bool:
    if isinstance(wanted, type):
        return isinstance(module, wanted)
    return wanted in (name, type(module).__name__)
