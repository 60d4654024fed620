"""Schedules as data: which action runs after which, on every rank. Pure: no tensors, no groups.

The text of an action and the CSV format are those of torch.distributed.pipelining: a line per rank, a cell per action,
`2F0` for the forward of stage 2 on micro-batch 0.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass

KINDS = {"F": "forward", "B": "backward", "I": "input gradient", "W": "weight gradient"}
_CELL = re.compile(r"(\d+)(F|B|I|W)(\d+)$")
_COMMUNICATION = re.compile(
    r"\d+(SEND_F|RECV_F|SEND_B|RECV_B|UNSHARD|RESHARD|REDUCE_GRAD)\d*$"
)  # follows from the rest
_OVERLAP = re.compile(r"\((.*)\)OVERLAP_F_B$")


class ScheduleError(ValueError):
    """A schedule that can't be: what is wrong, and where."""


@dataclass(frozen=True, order=True)
class Action:
    """kind: F forward, B backward, or its halves: I, the gradient of the input, and W, of the weights."""

    stage: int
    kind: str
    micro_batch: int

    def __str__(self) -> str:
        return f"{self.stage}{self.kind}{self.micro_batch}"


@dataclass(frozen=True)
class Schedule:
    """actions[rank]: in their order. ranks[stage]: which rank holds it."""

    name: str
    num_ranks: int
    micro_batches: int
    ranks: tuple[int, ...]
    actions: tuple[tuple[Action, ...], ...]

    @property
    def num_stages(self) -> int:
        return len(self.ranks)

    def rank_of(self, stage: int) -> int:
        return self.ranks[stage]

    def to_csv(self) -> str:
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        writer.writerows([str(action) for action in row] for row in self.actions)
        return out.getvalue()

    @classmethod
    def from_csv(cls, text: str, name: str = "csv") -> Schedule:
        """Stages, ranks and micro-batches follow from the cells; blank lines at the end don't count. Raises
        ScheduleError with line and column."""
        rows: list[tuple[Action, ...]] = []
        holder: dict[int, tuple[int, str]] = {}  # stage -> (rank, where it was seen first)
        for line, cells in enumerate(csv.reader(io.StringIO(text.removeprefix("\ufeff").rstrip())), 1):
            row: list[Action] = []
            for column, cell in enumerate(cells, 1):
                where = f"line {line}, column {column}"
                for action in _parse(cell.strip(), where):
                    rank, first = holder.setdefault(action.stage, (len(rows), where))
                    if rank != len(rows):
                        raise ScheduleError(
                            f"{name}, {where}: '{cell.strip()}' is of stage {action.stage}, which rank {rank} holds "
                            f"({first}); this line is rank {len(rows)}'s"
                        )
                    row.append(action)
            rows.append(tuple(row))
        stages = sorted(holder)
        if not stages or stages != list(range(len(stages))):
            missing = next((s for s in range(len(stages) + 1) if s not in holder), 0)
            raise ScheduleError(f"{name}: has stages {stages}, and none of number {missing}; they count from 0")
        count = 1 + max(action.micro_batch for row in rows for action in row)
        return cls(name, len(rows), count, tuple(holder[stage][0] for stage in stages), tuple(rows))


def _parse(cell: str, where: str) -> list[Action]:
    if not cell or _COMMUNICATION.match(cell):
        return []
    if both := _OVERLAP.match(cell):
        return [action for part in both[1].split(";") for action in _parse(part.strip(), where)]
    if not (found := _CELL.match(cell)):
        raise ScheduleError(
            f"{where}: '{cell}' is no action; write stage, kind and micro-batch, as 2F0, where the kind is one of "
            f"{', '.join(f'{k} ({v})' for k, v in KINDS.items())}"
        )
    return [Action(int(found[1]), found[2], int(found[3]))]


def loop_placement(num_ranks: int, num_stages: int) -> tuple[int, ...]:
    """0 1 2 0 1 2"""
    return tuple(stage % num_ranks for stage in range(num_stages))


def v_placement(num_ranks: int) -> tuple[int, ...]:
    """0 1 2 2 1 0"""
    return (*range(num_ranks), *reversed(range(num_ranks)))


def schedule_of(name: str, micro_batches: int, ranks: Sequence[int], rows: Sequence[Sequence[Action]]) -> Schedule:
    """Without the actions on micro-batches that aren't there: an order of more of them stays one."""
    kept = tuple(tuple(action for action in row if action.micro_batch < micro_batches) for row in rows)
    return Schedule(name, len(rows), micro_batches, tuple(ranks), kept)
