"""What a schedule needs of the rings: which edges there are, and how many slots each must have. Pure."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

from pypar.pipeline_parallel.schedule import Action, Schedule, ScheduleError

FORWARD, BACKWARD = "forward", "backward"


@dataclass(frozen=True)
class Link:
    """Messages from stage to stage: activations of stage `stage` to the next one, or gradients of its input to the one
    before."""

    stage: int
    direction: str

    @property
    def target(self) -> int:
        return self.stage + 1 if self.direction == FORWARD else self.stage - 1


def links(schedule: Schedule) -> list[Link]:
    """Between stages of different ranks, in a fixed order."""
    last = schedule.num_stages - 1
    found = [Link(stage, FORWARD) for stage in range(last)] + [Link(stage, BACKWARD) for stage in range(1, last + 1)]
    return [link for link in found if schedule.rank_of(link.stage) != schedule.rank_of(link.target)]


def slots_needed(schedule: Schedule, holds: bool, most: int = 64) -> dict[Link, int] | None:
    """{link: slots with which the schedule runs to its end, one to spare if possible}; None: not even with `most`.

    holds: a stage keeps the slot of an activation until its last backward action on it, since it computes on the slot
    itself; else it copies what it takes. The slot of a gradient is kept as long: weight gradients that wait read it.
    """
    slots = dict.fromkeys(links(schedule), 1)
    while waits := stuck(schedule, slots, holds):
        full = [link for _, _, link in waits if slots[link] < most]
        if not full:
            return None
        for link in full:
            slots[link] += 1
    return {link: min(most, count + 1) for link, count in slots.items()}


def sends_of(action: Action, num_stages: int) -> Link | None:
    if action.kind == "F":
        return Link(action.stage, FORWARD) if action.stage < num_stages - 1 else None
    if action.kind in ("B", "I"):
        return Link(action.stage, BACKWARD) if action.stage > 0 else None
    return None


def receives_of(action: Action, num_stages: int) -> Link | None:
    if action.kind == "F":
        return Link(action.stage - 1, FORWARD) if action.stage > 0 else None
    if action.kind in ("B", "I"):
        return Link(action.stage + 1, BACKWARD) if action.stage < num_stages - 1 else None
    return None


def stuck(schedule: Schedule, slots: dict[Link, int], holds: bool) -> list[tuple[int, Action, Link]]:
    """Runs all ranks until nobody can go on: (rank, action, link that is full) of those that wait to send then; empty
    when all is done. Raises ScheduleError where ranks wait for each other with slots to spare."""
    at = [0] * schedule.num_ranks
    sent: dict[Link, set[int]] = defaultdict(set)
    taken: dict[Link, int] = defaultdict(int)  # slots in use
    local: dict[Link, set[int]] = defaultdict(set)
    computed: list[bool] = [False] * schedule.num_ranks  # the action at `at` has run, and waits for a slot to send
    splits = {a.stage for row in schedule.actions for a in row if a.kind == "W"}

    def release(action: Action) -> None:
        ends = action.kind == "B" or (action.kind == "W" if action.stage in splits else action.kind == "I")
        held = [Link(action.stage + 1, BACKWARD), *([Link(action.stage - 1, FORWARD)] if holds else [])]
        for link in held if ends else []:
            if link in slots:
                taken[link] -= 1

    moved = True
    while moved:
        moved = False
        for rank, row in enumerate(schedule.actions):
            while at[rank] < len(row):
                action = row[at[rank]]
                if not computed[rank]:
                    source = receives_of(action, schedule.num_stages)
                    if source is not None:
                        arrived = sent[source] if source in slots else local[source]
                        if action.micro_batch not in arrived:
                            break
                        arrived.discard(action.micro_batch)
                        if source in slots and source.direction == FORWARD and not holds:
                            taken[source] -= 1
                    release(action)
                    computed[rank] = True
                target = sends_of(action, schedule.num_stages)
                if target is not None:
                    if target in slots:
                        if taken[target] >= slots[target]:
                            break
                        taken[target] += 1
                        sent[target].add(action.micro_batch)
                    else:
                        local[target].add(action.micro_batch)
                computed[rank], at[rank] = False, at[rank] + 1
                moved = True
    waiting = [rank for rank in range(schedule.num_ranks) if at[rank] < len(schedule.actions[rank])]
    if not waiting:
        return []
    full = []
    for rank in waiting:
        if computed[rank]:
            action = schedule.actions[rank][at[rank]]
            target = sends_of(action, schedule.num_stages)
            assert target is not None
            full.append((rank, action, target))
    if not full:
        rank = waiting[0]
        raise ScheduleError(
            f"schedule '{schedule.name}': rank {rank} waits for ever at {schedule.actions[rank][at[rank]]}"
        )
    return full
