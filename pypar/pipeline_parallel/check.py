"""Whether a schedule can run, from the data alone."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from pypar.pipeline_parallel.plan import FORWARD, Link, links, slots_needed, stuck
from pypar.pipeline_parallel.schedule import KINDS, Schedule, ScheduleError
from pypar.pipeline_parallel.simulate import peak_of, simulate


@dataclass(frozen=True)
class Report:
    """peaks[rank]: activations held at most. slots: that the rings need, by link."""

    peaks: tuple[int, ...]
    slots: dict[Link, int]


def check(schedule: Schedule, slots: int | None = None, holds: bool = True) -> Report:
    """Proves of a schedule: every action is there once and on its stage's rank, runs after what it needs, and no rank
    waits for ever. slots: that every ring has; None: as many as it takes, even where they are more than Pipeline makes.
    holds: see plan.slots_needed.

    Raises ScheduleError, which names the rank, the action and what is missing.
    """
    name = f"schedule '{schedule.name}'"
    held_by = {
        stage: rank for rank in range(schedule.num_ranks) for stage, at in enumerate(schedule.ranks) if at == rank
    }
    if len(held_by) != schedule.num_stages or len(schedule.actions) != schedule.num_ranks:
        raise ScheduleError(f"{name}: its stages lie on ranks {schedule.ranks}, and it has {schedule.num_ranks} ranks")
    if idle := set(range(schedule.num_ranks)) - set(schedule.ranks):
        raise ScheduleError(f"{name}: rank {min(idle)} holds no stage; its stages lie on ranks {schedule.ranks}")
    if schedule.micro_batches < 1:
        raise ScheduleError(f"{name}: has {schedule.micro_batches} micro-batches; one is the least")
    seen: Counter[tuple[int, str, int]] = Counter()
    for rank, row in enumerate(schedule.actions):
        for place, action in enumerate(row):
            if action.kind not in KINDS:
                raise ScheduleError(
                    f"{name}: rank {rank} has {action} (its action {place}); kinds are {', '.join(KINDS)}"
                )
            if action.stage not in held_by or not 0 <= action.micro_batch < schedule.micro_batches:
                raise ScheduleError(f"{name}: rank {rank} has {action} (its action {place}), which is not there")
            if held_by[action.stage] != rank:
                raise ScheduleError(
                    f"{name}: rank {rank} has {action} (its action {place}); stage {action.stage} is rank "
                    f"{held_by[action.stage]}'s"
                )
            seen[action.stage, action.kind, action.micro_batch] += 1
    for stage, rank in held_by.items():
        for i in range(schedule.micro_batches):
            count = {kind: seen[stage, kind, i] for kind in "FBIW"}
            twice = next((kind for kind, n in count.items() if n > 1), None)
            if twice is not None:
                raise ScheduleError(f"{name}: rank {rank} has {stage}{twice}{i} {count[twice]} times")
            if count["F"] == 0:
                raise ScheduleError(f"{name}: rank {rank} never runs {stage}F{i}")
            halves = (count["I"], count["W"])
            if (count["B"], *halves) not in ((1, 0, 0), (0, 1, 1)):
                missing = (
                    f"{stage}B{i}, or {stage}I{i} and {stage}W{i}"
                    if not any((count["B"], *halves))
                    else f"one of {stage}B{i}, {stage}I{i} with {stage}W{i}: it has {count}"
                )
                raise ScheduleError(f"{name}: rank {rank} lacks {missing}")
    simulate(schedule)  # what waits for ever whatever the slots
    if slots is None:
        found = slots_needed(schedule, holds, most=schedule.micro_batches + 1)
        assert found is not None  # a ring with a slot for every micro-batch is never full
    else:
        found = dict.fromkeys(links(schedule), slots)
        for rank, action, link in stuck(schedule, found, holds):
            kind = "activations" if link.direction == FORWARD else "gradients"
            raise ScheduleError(
                f"{name}: with {slots} slots rank {rank} waits for ever at {action}: the ring of {kind} from stage "
                f"{link.stage} to {link.target} is full; give it more slots"
            )
    peaks = tuple(peak_of(schedule, rank) for rank in range(schedule.num_ranks))
    return Report(peaks, found)
