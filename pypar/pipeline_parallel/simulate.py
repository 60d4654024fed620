"""What a schedule costs: when each action runs for given costs, who idles, how much is held. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from pypar.pipeline_parallel.schedule import Action, Schedule, ScheduleError


@dataclass(frozen=True)
class Costs:
    """Units of time of one action of one stage; a B is an I and a W. communication: from rank to rank."""

    forward: float = 1.0
    input_gradient: float = 1.0
    weight_gradient: float = 1.0
    communication: float = 0.0

    def of(self, action: Action) -> float:
        both = self.input_gradient + self.weight_gradient
        return {"F": self.forward, "I": self.input_gradient, "W": self.weight_gradient, "B": both}[action.kind]


@dataclass(frozen=True)
class Span:
    action: Action
    start: float
    end: float


@dataclass(frozen=True)
class Timeline:
    """spans[rank] in order. peaks[rank]: the most activations held at a time, in stages of a micro-batch, from their
    forward to the end of their backward."""

    schedule: Schedule
    spans: tuple[tuple[Span, ...], ...]
    peaks: tuple[int, ...]

    @property
    def makespan(self) -> float:
        return max((row[-1].end for row in self.spans if row), default=0.0)

    @property
    def busy(self) -> float:
        """Of the busiest rank."""
        return max(sum(span.end - span.start for span in row) for row in self.spans)

    @property
    def idle(self) -> tuple[float, ...]:
        """idle[rank]: time of the makespan in which it runs nothing."""
        return tuple(self.makespan - sum(span.end - span.start for span in row) for row in self.spans)

    @property
    def bubble(self) -> float:
        """Share of the makespan that the busiest rank idles."""
        return 1 - self.busy / self.makespan if self.makespan else 0.0

    @property
    def idle_inside(self) -> float:
        """Time that a rank idles between its own first action and its last, of the rank with the most."""
        return max(row[-1].end - row[0].start - sum(span.end - span.start for span in row) for row in self.spans if row)


def needs_of(action: Action, num_stages: int) -> list[list[Action]]:
    """What must have run before: of each list, one."""
    stage, i = action.stage, action.micro_batch
    if action.kind == "F":
        return [[Action(stage - 1, "F", i)]] if stage else []
    if action.kind == "W":
        return [[Action(stage, "I", i)]]
    needs = [[Action(stage, "F", i)]]
    if stage < num_stages - 1:
        needs.append([Action(stage + 1, "I", i), Action(stage + 1, "B", i)])
    return needs


def simulate(schedule: Schedule, costs: Costs | None = None) -> Timeline:
    """Every action as early as its rank's order and what it needs allow; slots of the rings don't count. Raises
    ScheduleError where ranks wait for each other for ever."""
    costs = costs or Costs()
    done: dict[Action, float] = {}
    spans: list[list[Span]] = [[] for _ in schedule.actions]
    at = [0] * schedule.num_ranks
    moved = True
    while moved:
        moved = False
        for rank, row in enumerate(schedule.actions):
            while at[rank] < len(row):
                action = row[at[rank]]
                start = spans[rank][-1].end if spans[rank] else 0.0
                ready = _ready(action, rank, schedule, done, costs)
                if ready is None:
                    break
                start = max(start, ready)
                done[action] = start + costs.of(action)
                spans[rank].append(Span(action, start, done[action]))
                at[rank] += 1
                moved = True
    for rank, row in enumerate(schedule.actions):
        if at[rank] < len(row):
            action = row[at[rank]]
            missing = [" or ".join(map(str, any_of)) for any_of in needs_of(action, schedule.num_stages)
                       if not any(each in done for each in any_of)]  # fmt: skip
            raise ScheduleError(
                f"schedule '{schedule.name}': rank {rank} waits for ever at {action} (its action {at[rank]}) for "
                f"{', '.join(missing)}"
            )
    peaks = tuple(peak_of(schedule, rank) for rank in range(schedule.num_ranks))
    return Timeline(schedule, tuple(map(tuple, spans)), peaks)


def _ready(action: Action, rank: int, schedule: Schedule, done: dict[Action, float], costs: Costs) -> float | None:
    ready = 0.0
    for any_of in needs_of(action, schedule.num_stages):
        found = next((each for each in any_of if each in done), None)
        if found is None:
            return None
        away = schedule.rank_of(found.stage) != rank
        ready = max(ready, done[found] + (costs.communication if away else 0.0))
    return ready


def peak_of(schedule: Schedule, rank: int) -> int:
    held = peak = 0
    for action in schedule.actions[rank]:
        held += {"F": 1, "B": -1, "W": -1, "I": 0}[action.kind]
        peak = max(peak, held)
    return peak
