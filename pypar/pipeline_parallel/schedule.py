"""placeholder while the real one is written"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Action:
    stage: int
    kind: str
    micro_batch: int


@dataclass(frozen=True)
class Schedule:
    name: str
    num_ranks: int
    num_stages: int
    micro_batches: int
    rank_of: Callable[[int], int]
    actions: tuple[tuple[Action, ...], ...]


def make_schedule(name: str, num_ranks: int, micro_batches: int, num_stages: int | None = None) -> Schedule:
    p, m = num_ranks, micro_batches
    rows = []
    for r in range(p):
        if name == "gpipe":
            row = [Action(r, "F", i) for i in range(m)] + [Action(r, "B", i) for i in range(m)]
        else:
            warm = min(m, p - 1 - r)
            row = [Action(r, "F", i) for i in range(warm)]
            for i in range(m - warm):
                row += [
                    Action(r, "F", warm + i),
                    *([Action(r, "I", i), Action(r, "W", i)] if name == "zbh1" else [Action(r, "B", i)]),
                ]
            for i in range(m - warm, m):
                row += [Action(r, "I", i), Action(r, "W", i)] if name == "zbh1" else [Action(r, "B", i)]
        rows.append(tuple(row))
    return Schedule(name, p, p, m, lambda s: s, tuple(rows))
