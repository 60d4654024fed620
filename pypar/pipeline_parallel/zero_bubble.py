"""Schedules whose backward is split: a building block, repeated and squeezed.

Qi et al., Zero Bubble Pipeline Parallelism (2023), put weight gradients (W) where a rank would idle. Qi et al.,
Pipeline Parallelism with Controllable Memory (2024), describe such schedules by the passes of one micro-batch, the
block, which is repeated at an interval: how long a micro-batch stays with a rank, divided by the interval, is how many
of them the rank holds. All passes take one unit of time. The block's times give the order of forwards and input
gradients; then time is squeezed out, and a weight gradient runs when a rank has nothing else to do, or no room for
another forward.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from pypar.pipeline_parallel.schedule import Action, Schedule, schedule_of, v_placement

Pass = tuple[int, int, str]  # (time, stage, kind)


def zbh1(num_ranks: int, micro_batches: int, num_stages: int) -> Schedule:
    """1F1B's memory, a third of its bubble."""
    return _plain("zbh1", num_ranks, micro_batches, forward=1, backward=2, most=num_ranks)


def zb2p(num_ranks: int, micro_batches: int, num_stages: int) -> Schedule:
    """Nearly twice 1F1B's memory; no rank idles between its first action and its last (ZB-H2)."""
    return _plain("zb2p", num_ranks, micro_batches, forward=3, backward=3, most=2 * num_ranks - 1)


def zbv(num_ranks: int, micro_batches: int, num_stages: int) -> Schedule:
    """Two stages per rank in a V: 1F1B's memory, and no bubble but the way to the last rank."""
    return _folded("zbv", num_ranks, micro_batches, offsets=(4, 2, 4, 2), most=2 * num_ranks)


def vhalf(num_ranks: int, micro_batches: int, num_stages: int) -> Schedule:
    """Half of 1F1B's memory."""
    return _folded("vhalf", num_ranks, micro_batches, offsets=(2, 1, 2, 1), most=(num_ranks + 2) // 2 * 2)


def vmin(num_ranks: int, micro_batches: int, num_stages: int) -> Schedule:
    """A third of 1F1B's memory."""
    return _folded("vmin", num_ranks, micro_batches, offsets=(1, 1, 1, 1), most=(num_ranks + 4) // 3 * 2)


def _plain(name: str, p: int, m: int, forward: int, backward: int, most: int) -> Schedule:
    """forward, backward: units by which a pass is later on the next rank, on the rank before."""
    turn = forward * (p - 1) + 1  # the last rank's backward
    block = [[(forward * r, r, "F"), (turn + backward * (p - 1 - r), r, "I")] for r in range(p)]
    rows = _squeeze(_repeat(block, 3, m), range(p), m, most)
    return schedule_of(name, m, range(p), rows)


def _folded(name: str, p: int, m: int, offsets: tuple[int, int, int, int], most: int) -> Schedule:
    """offsets: units by which a pass is later on the next rank: forward down the V, up, backward down, up.

    Between the four legs lie the shortest waits for which a rank's passes, of all micro-batches, fall into different
    units.
    """
    for waits in sorted(itertools.product(range(1, 7), repeat=3), key=lambda w: (sum(w), w)):
        block = _fold(p, offsets, waits)
        if all(len({time % 6 for time, _, _ in passes}) == 4 for passes in block):
            break
    rows = _squeeze(_repeat(block, 6, m), v_placement(p), m, most)
    return schedule_of(name, m, v_placement(p), rows)


def _fold(p: int, offsets: Sequence[int], waits: Sequence[int]) -> list[list[Pass]]:
    down, up, back_down, back_up = offsets
    second = down * (p - 1) + waits[0]
    third = second + up * (p - 1) + waits[1]
    fourth = third + back_down * (p - 1) + waits[2]
    return [
        [
            (down * r, r, "F"),
            (second + up * (p - 1 - r), 2 * p - 1 - r, "F"),
            (third + back_down * r, 2 * p - 1 - r, "I"),
            (fourth + back_up * (p - 1 - r), r, "I"),
        ]
        for r in range(p)
    ]


def _repeat(block: list[list[Pass]], interval: int, m: int) -> list[list[Action]]:
    """The order of the passes of all micro-batches, each `interval` later than the one before."""
    rows = []
    for passes in block:
        timed = sorted((time + interval * i, stage, kind, i) for time, stage, kind in passes for i in range(m))
        rows.append([Action(stage, kind, i) for _, stage, kind, i in timed])
    return rows


def _squeeze(rows: list[list[Action]], ranks: Sequence[int], m: int, most: int) -> list[list[Action]]:
    """Every action as early as it can be, and weight gradients where a rank would wait or holds `most` already."""
    last = len(ranks) - 1
    done: dict[Action, int] = {}
    at, held = [0] * len(rows), [0] * len(rows)
    off: list[list[Action]] = [[] for _ in rows]
    out: list[list[Action]] = [[] for _ in rows]
    left = sum(map(len, rows)) + len(ranks) * m

    def is_ready(action: Action, now: int) -> bool:
        stage, i = action.stage, action.micro_batch
        needs = []
        if action.kind == "I":
            needs = [Action(stage, "F", i)] + ([Action(stage + 1, "I", i)] if stage < last else [])
        elif stage > 0:
            needs = [Action(stage - 1, "F", i)]
        return all(done.get(each, now) < now for each in needs)

    for now in itertools.count():
        for r, row in enumerate(rows):
            action = row[at[r]] if at[r] < len(row) else None
            if action is not None:
                is_full = action.kind == "F" and held[r] >= most and bool(off[r])
                if is_full or not is_ready(action, now):
                    action = None
            if action is not None:
                at[r] += 1
            elif off[r]:
                action = off[r].pop(0)
            else:
                continue
            out[r].append(action)
            done[action] = now
            left -= 1
            held[r] += {"F": 1, "I": 0, "W": -1}[action.kind]
            if action.kind == "I":
                off[r].append(Action(action.stage, "W", action.micro_batch))
        if left == 0:
            return out
    raise AssertionError
