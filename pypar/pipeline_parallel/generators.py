"""The schedules by name. Each is an order for any number of ranks and micro-batches; what a paper asks to be divisible
is rounded up, and the actions that aren't there are left out; `interleaved` shares out instead."""

from __future__ import annotations

import itertools
from collections.abc import Callable

from pypar.pipeline_parallel.schedule import Action, Schedule, loop_placement, schedule_of, v_placement
from pypar.pipeline_parallel.zero_bubble import vhalf, vmin, zb2p, zbh1, zbv


def gpipe(num_ranks: int, micro_batches: int, num_stages: int) -> Schedule:
    """All forwards, then all backwards. Huang et al. (2019)."""
    rows = [[Action(rank, kind, i) for kind in "FB" for i in range(micro_batches)] for rank in range(num_ranks)]
    return schedule_of("gpipe", micro_batches, range(num_ranks), rows)


def one_f_one_b(num_ranks: int, micro_batches: int, num_stages: int) -> Schedule:
    """A forward for each backward, once every rank has work. Narayanan et al., PipeDream-Flush (2021)."""
    rows = []
    for rank in range(num_ranks):
        ahead = min(micro_batches, num_ranks - 1 - rank)
        row = [Action(rank, "F", i) for i in range(ahead)]
        for i in range(micro_batches):
            if ahead + i < micro_batches:
                row.append(Action(rank, "F", ahead + i))
            row.append(Action(rank, "B", i))
        rows.append(row)
    return schedule_of("1f1b", micro_batches, range(num_ranks), rows)


def interleaved(num_ranks: int, micro_batches: int, num_stages: int) -> Schedule:
    """1F1B with several stages per rank, which take turns after every num_ranks micro-batches. Narayanan et al.,
    Efficient Large-Scale Language Model Training on GPU Clusters (2021).

    What num_ranks doesn't divide is shared out, so that no turn is shorter: a short one would leave every rank idle
    once for each of its stages. The first turns are the longer ones, since the forwards run ahead by the first.
    """
    p, v = num_ranks, num_stages // num_ranks
    groups = _turns(micro_batches, max(1, micro_batches // p))
    rows = []
    for rank in range(p):
        forward = [Action(c * p + rank, "F", i) for group in groups for c in range(v) for i in group]
        backward = [Action(c * p + rank, "B", i) for group in groups for c in reversed(range(v)) for i in group]
        ahead = min(len(forward), 2 * (p - 1 - rank) + (v - 1) * len(groups[0]))
        row = forward[:ahead]
        for k, action in enumerate(backward):
            row += [*forward[ahead + k : ahead + k + 1], action]
        rows.append(row)
    return schedule_of("interleaved", micro_batches, loop_placement(p, num_stages), rows)


def _turns(micro_batches: int, count: int) -> list[range]:
    least, longer = divmod(micro_batches, count)
    starts = [i * least + min(i, longer) for i in range(count + 1)]
    return [range(first, end) for first, end in itertools.pairwise(starts)]


def breadth_first(num_ranks: int, micro_batches: int, num_stages: int) -> Schedule:
    """GPipe with several stages per rank: a stage runs all micro-batches before the next. Lamy-Poirier (2023)."""
    p, v = num_ranks, num_stages // num_ranks
    every = range(micro_batches)
    rows = [
        [Action(c * p + rank, "F", i) for c in range(v) for i in every]
        + [Action(c * p + rank, "B", i) for c in reversed(range(v)) for i in every]
        for rank in range(p)
    ]
    return schedule_of("breadth-first", micro_batches, loop_placement(p, num_stages), rows)


def dualpipev(num_ranks: int, micro_batches: int, num_stages: int) -> Schedule:
    """Two stages per rank in a V; the forward of one beside the backward of the other. DeepSeek, DualPipe (2025), cut
    in half."""
    p, m = num_ranks, max(micro_batches, 2 * num_ranks)
    rows = []
    for rank in range(p):
        row = _Row(first=rank, second=2 * p - 1 - rank)
        row.repeat(2 * (p - 1 - rank), "F0")
        row.repeat(rank + 1, "F0 F1")
        row.repeat(p - 1 - rank, "I1 W F1")
        row.repeat(m - 2 * p + rank + 1, "F0 B1 F1 B0")
        row.repeat(p - 1 - rank, "B1 F1 B0")
        full = (rank + 1) // 2  # of the last backwards, which still are whole
        row.repeat(full, "B1 B0")
        if rank % 2 == 0:
            row.repeat(1, "B1 I0")
        row.repeat(rank + 1 - full - (rank % 2 == 0), "I1 I0")
        row.repeat(p - 1 - rank, "W I0")
        row.repeat(row.waiting, "W")
        rows.append(row.actions)
    return schedule_of("dualpipev", micro_batches, v_placement(p), rows)


class _Row:
    """A rank's actions, written by chunk: F0 is the next forward of its first stage, W the oldest weight gradient that
    was put off."""

    def __init__(self, first: int, second: int):
        self.stages = (first, second)
        self.actions: list[Action] = []
        self._count: dict[tuple[str, int], int] = {}
        self._off: list[Action] = []

    @property
    def waiting(self) -> int:
        return len(self._off)

    def repeat(self, times: int, words: str) -> None:
        for word in words.split() * times:
            if word == "W":
                if self._off:
                    self.actions.append(self._off.pop(0))
                continue
            stage = self.stages[int(word[1])]
            way = "F" if word[0] == "F" else "B"
            index = self._count[way, stage] = self._count.get((way, stage), -1) + 1
            self.actions.append(Action(stage, word[0], index))
            if word[0] == "I":
                self._off.append(Action(stage, "W", index))


Generator = Callable[[int, int, int], Schedule]
_LOOPED: dict[str, Generator] = {"interleaved": interleaved, "breadth-first": breadth_first}
_FOLDED: dict[str, Generator] = {"zbv": zbv, "vhalf": vhalf, "vmin": vmin, "dualpipev": dualpipev}
_PLAIN: dict[str, Generator] = {"gpipe": gpipe, "1f1b": one_f_one_b, "zbh1": zbh1, "zb2p": zb2p}
NAMES = tuple({**_PLAIN, **_LOOPED, **_FOLDED})


def make_schedule(name: str, num_ranks: int, micro_batches: int, num_stages: int | None = None) -> Schedule:
    """The schedule of that name. num_stages: default one per rank, or two where the schedule wants several.

    Raises ValueError: an unknown name, no micro-batch, a number of stages that the schedule can't place.
    """
    if micro_batches < 1 or num_ranks < 1:
        raise ValueError(f"{micro_batches} micro-batches on {num_ranks} ranks: a schedule needs one of each at least")
    if name in _PLAIN:
        generator, per_rank, wants = _PLAIN[name], 1, "one stage per rank"
    elif name in _FOLDED:
        generator, per_rank, wants = _FOLDED[name], 2, "two stages per rank"
    elif name in _LOOPED:
        generator, wants = _LOOPED[name], "the same number of stages on every rank"
        per_rank = max(1, (num_stages or 2 * num_ranks) // num_ranks)
    else:
        raise ValueError(f"schedule '{name}' is unknown; there are {', '.join(NAMES)}")
    stages = num_ranks * per_rank
    if num_stages not in (None, stages):
        raise ValueError(f"schedule '{name}' has {wants}: {stages} stages on {num_ranks} ranks, not {num_stages}")
    return generator(num_ranks, micro_batches, stages)
