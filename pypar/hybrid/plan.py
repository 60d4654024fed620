"""Plan: how a model and its batches are shared out, as data: it prints, parses, compares; checked without ranks."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from pypar.pipeline_parallel.generators import NAMES, make_schedule
from pypar.placement import cut
from pypar.tensor_parallel import check_plan

AXES = ("pp", "dp", "tp")
PRECISIONS = (None, "float32", "bfloat16")
REDUCES = ("auto", "once", "micro-batch")


class PlanError(ValueError):
    """A plan that can't run. nearest: a plan that is legal and differs from it in as little as possible, or None."""

    def __init__(self, cell: str, why: str, nearest: Plan | None = None):
        hint = f"; the nearest legal plan: {nearest}" if nearest is not None else ""
        super().__init__(f"plan {cell}: {why}{hint}")
        self.cell, self.why, self.nearest = cell, why, nearest


@dataclass(frozen=True)
class Plan:
    """Ranks as pp x dp x tp, and what each axis does.

    pp              ranks of a pipeline
    dp              copies of the model, which share the batch
    tp              ranks that share every layer
    zero            what the dp ranks share out: 0 nothing, 1 the optimizer's states, 2 gradients too, 3 parameters too
    replicate       hybrid sharding, with zero: of the dp ranks, how many hold the same shards (replicate x shard = dp)
    schedule        of the pipeline: pypar.pipeline_parallel.generators.NAMES
    micro_batches   into which a train_step cuts this rank's batch; without a pipeline they run one after the other
    num_stages      of schedules with several stages per rank; None: as the schedule has it
    split           of the pipeline: "auto", "balanced" (also inside blocks), numbers of blocks per stage, or names of
                    the blocks with which stages begin
    carry           names of blocks whose output later stages read as well
    tp_plan         "auto", or {pattern: style} as pypar.tensor_parallel takes it
    sequence_parallel, loss_parallel
                    as pypar.tensor_parallel's; with loss_parallel, loss_fn gets this rank's columns of the logits
    recompute       activations of the blocks are computed again in backward
    precision       "bfloat16": parameters, activations and gradients, with float32 masters and sums (needs zero)
    reduce          with a pipeline and zero 2 or 3: when gradients become shards. "once", at the end of a train_step;
                    "micro-batch", after each, so that full gradients of one stage exist at a time; "auto": the latter
    order           the axes from the outermost to the innermost, whose ranks are neighbours

    str(plan) says what differs from the default, and Plan.parse reads it back: "pp=2 dp=2 zero=3 schedule=zbv".
    """

    pp: int = 1
    dp: int = 1
    tp: int = 1
    zero: int = 0
    replicate: int = 1
    schedule: str = "1f1b"
    micro_batches: int = 1
    num_stages: int | None = None
    split: str | tuple[str, ...] | tuple[int, ...] = "auto"
    carry: tuple[str, ...] = ()
    tp_plan: Any = "auto"
    sequence_parallel: bool = False
    loss_parallel: bool = False
    recompute: bool = False
    precision: str | None = None
    reduce: str = "auto"
    order: tuple[str, ...] = AXES

    @property
    def world_size(self) -> int:
        return self.pp * self.dp * self.tp

    def __str__(self) -> str:
        said = [f"{name}={_shown(value)}" for name, value in self._differences(Plan())]
        return " ".join(said) or "dp=1"

    def _differences(self, other: Plan) -> Iterator[tuple[str, Any]]:
        for field in dataclasses.fields(self):
            if getattr(self, field.name) != getattr(other, field.name):
                yield field.name, getattr(self, field.name)

    def diff(self, other: Plan) -> str:
        """What turns this plan into the other one, a line each: `zero: 1 -> 3`."""
        return "\n".join(f"{n}: {_shown(getattr(self, n))} -> {_shown(v)}" for n, v in other._differences(self))

    def to_json(self) -> str:
        """All fields, as an object with sorted keys."""
        return json.dumps(dataclasses.asdict(self), indent=1, sort_keys=True)

    @classmethod
    def of(cls, plan: Plan | str | dict[str, Any]) -> Plan:
        """A plan, its text, or its fields. Raises PlanError."""
        if isinstance(plan, str):
            return cls.parse(plan)
        return cls._of(plan) if isinstance(plan, dict) else plan

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Raises PlanError for what is no such object."""
        try:
            values = json.loads(text)
        except ValueError as error:
            raise PlanError("JSON", str(error)) from error
        if not isinstance(values, dict):
            raise PlanError("JSON", f"expected an object of fields, got {type(values).__name__}")
        return cls._of(values)

    @classmethod
    def parse(cls, text: str) -> Plan:
        """Of `name=value` pairs with spaces or commas between them, as str(plan) gives them. Raises PlanError."""
        values: dict[str, Any] = {}
        for word in _words(text):
            name, equals, value = word.partition("=")
            if not equals:
                raise PlanError(f"'{word}'", "give name=value, for example pp=2")
            values[name.strip().replace("-", "_")] = _read(value.strip())
        return cls._of(values)

    @classmethod
    def _of(cls, values: dict[str, Any]) -> Plan:
        fields = {field.name: field for field in dataclasses.fields(cls)}
        for name, value in values.items():
            if name not in fields:
                raise PlanError(f"{name}={_shown(value)}", f"there is no such field; they are {', '.join(fields)}")
        given: dict[str, Any] = {n: tuple(v) if isinstance(v, list) else v for n, v in values.items()}
        for name in ("carry", "order"):
            if isinstance(given.get(name), str):
                given[name] = tuple(given[name].split("+"))
        for name, value in given.items():
            wanted = type(fields[name].default)
            if wanted in (int, bool) and type(value) is not wanted:
                raise PlanError(
                    f"{name}={_shown(value)}", f"expected {'a number' if wanted is int else 'true or false'}"
                )
        return cls(**given)

    # -- what can't run ------------------------------------------------------------------------------------------------

    def check(self, world_size: int | None = None, model: nn.Module | None = None) -> None:
        """Raises PlanError with the cell, the reason and the nearest legal plan.

        world_size: of the job. model: the full one, which may be on the meta device; nothing of it is changed."""
        self._check_fields()
        if self.zero == 0 and self.replicate > 1:
            raise self._error(f"replicate={self.replicate}", "needs zero 1, 2 or 3, whose shards it copies", zero=1)
        if self.dp % self.replicate:
            divisors = [n for n in range(1, self.dp + 1) if self.dp % n == 0]
            near = min(divisors, key=lambda n: abs(n - self.replicate))
            raise self._error(f"replicate={self.replicate}", f"does not divide dp={self.dp}", replicate=near)
        if self.precision == "bfloat16" and self.zero == 0:
            raise self._error("precision=bfloat16 zero=0", "the float32 masters are ZeRO's", zero=1)
        if self.tp == 1 and self.loss_parallel:
            raise self._error("loss_parallel=true tp=1", "there is no part of the logits", loss_parallel=False)
        if self.tp == 1 and self.sequence_parallel:
            raise self._error(
                "sequence_parallel=true tp=1", "there is no axis to share rows on", sequence_parallel=False
            )
        if self.pp > 1:
            self._check_schedule()
        if world_size is not None and self.world_size != world_size:
            raise PlanError(
                f"pp={self.pp} dp={self.dp} tp={self.tp}",
                f"is {self.world_size} ranks, and the job has {world_size}",
                self._fit(world_size, model),
            )
        if model is not None:
            self._check_model(model)

    def _check_fields(self) -> None:
        for name in ("pp", "dp", "tp", "replicate", "micro_batches"):
            if getattr(self, name) < 1:
                raise self._error(f"{name}={getattr(self, name)}", "must be 1 or more", **{name: 1})
        if self.zero not in (0, 1, 2, 3):
            near = min(3, max(0, self.zero))
            raise self._error(f"zero={self.zero}", "there are 0 (none), 1, 2 and 3", zero=near)
        if self.precision not in PRECISIONS:
            raise self._error(f"precision={self.precision}", "there are float32 and bfloat16", precision=None)
        if self.reduce not in REDUCES:
            raise self._error(f"reduce={self.reduce}", f"there are {', '.join(REDUCES)}", reduce="auto")
        if sorted(self.order) != sorted(AXES):
            raise self._error(f"order={'+'.join(self.order)}", "name pp, dp and tp once each", order=AXES)

    def _check_schedule(self) -> None:
        if self.recompute and self.split == "balanced":
            raise self._error("split=balanced recompute=true", "blocks are computed again whole", split="auto")
        if self.schedule not in NAMES:
            raise self._error(f"schedule={self.schedule}", f"there are {', '.join(NAMES)}", schedule="1f1b")
        try:
            make_schedule(self.schedule, self.pp, self.micro_batches, self.num_stages)
        except ValueError as error:
            raise self._error(
                f"schedule={self.schedule} pp={self.pp} num_stages={self.num_stages}", str(error), num_stages=None
            ) from error

    def _check_model(self, model: nn.Module) -> None:
        said = [f"{n}=true" for n in ("sequence_parallel", "loss_parallel") if getattr(self, n)]
        tensor_cell = " ".join([f"tp={self.tp}", *said])
        for cell, check in (
            (f"pp={self.pp} schedule={self.schedule}", self._check_stages),
            (tensor_cell, self._check_tensor_parallel),
        ):
            try:
                check(model)
            except ValueError as error:
                raise PlanError(cell, str(error), self._fit(None, model)) from error

    def _check_stages(self, model: nn.Module) -> None:
        if self.pp > 1:
            schedule = make_schedule(self.schedule, self.pp, self.micro_batches, self.num_stages)
            cut(model, schedule.num_stages, self.split)

    def _check_tensor_parallel(self, model: nn.Module) -> None:
        if self.tp > 1:
            check_plan(
                model, self.tp, self.tp_plan,
                sequence_parallel=self.sequence_parallel, loss_parallel=self.loss_parallel,
            )  # fmt: skip

    def _error(self, cell: str, why: str, **changes: Any) -> PlanError:
        nearest: Plan | None = dataclasses.replace(self, **changes)
        try:
            assert nearest is not None
            nearest.check()
        except PlanError as error:
            nearest = error.nearest
        return PlanError(cell, why, nearest)

    def _fit(self, world_size: int | None, model: nn.Module | None) -> Plan | None:
        """The legal plan of so many ranks (None: as many as this one has) whose axes are the most like this one's."""
        wanted = self.world_size if world_size is None else world_size
        for pp, dp, tp in sorted(_factors(wanted), key=self._distance):
            changes: dict[str, Any] = {"pp": pp, "dp": dp, "tp": tp}
            changes |= {"replicate": math.gcd(self.replicate, dp)}
            if tp == 1:
                changes |= {"sequence_parallel": False, "loss_parallel": False}
            if pp != self.pp:
                changes |= {"split": "auto", "num_stages": None}
            same = dataclasses.replace(self, **changes)
            options: list[dict[str, Any]] = [{}, {"loss_parallel": False}, {"sequence_parallel": False}]
            for found in (dataclasses.replace(same, **option) for option in [*options, {**options[1], **options[2]}]):
                try:
                    found.check(wanted)
                    if model is not None:
                        found._check_stages(model)
                        found._check_tensor_parallel(model)
                except ValueError:
                    continue
                return found
        return None

    def _distance(self, axes: tuple[int, int, int]) -> float:
        mine = (self.pp, self.dp, self.tp)
        return sum(abs(math.log2(a / max(1, b))) for a, b in zip(axes, mine, strict=True))


def _factors(number: int) -> Iterator[tuple[int, int, int]]:
    for pp in range(1, number + 1):
        if number % pp == 0:
            for tp in range(1, number // pp + 1):
                if (number // pp) % tp == 0:
                    yield pp, number // pp // tp, tp


def _words(text: str) -> list[str]:
    """Parts with spaces or commas between them; commas and spaces within brackets and braces stay."""
    words, depth, word = [], 0, ""
    for letter in text:
        depth += (letter in "[{(") - (letter in "]})")
        if depth == 0 and letter in ", \t\n":
            words.append(word)
            word = ""
        else:
            word += letter
    return [each for each in [*words, word] if each]


def _read(value: str) -> Any:
    try:
        return json.loads(value)
    except ValueError:
        return {"none": None, "None": None, "True": True, "False": False}.get(value, value)


def _shown(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, tuple) and value and all(v in AXES for v in value):
        return "+".join(value)
    return json.dumps(value, separators=(",", ":"))
