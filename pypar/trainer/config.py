"""The settings of a run: one flat record, saved with every checkpoint."""

from __future__ import annotations

import dataclasses
import math
import os
from dataclasses import dataclass
from typing import Any

from pypar.hybrid.plan import Plan, PlanError
from pypar.trainer.errors import TrainError

MAX_RANKS_PER_CORE = 8


@dataclass(frozen=True)
class TrainConfig:
    """Defaults: two CPU ranks with one thread each learn the standard library's sources in two or three minutes.

    batch_size: sequences per optimizer step, over all ranks and accumulation steps. seq_len: tokens per sequence.
    dp: copies of the model, which share the batch. tp: ranks that share one copy. zero: the stage of ZeRO over
    the dp ranks, 0 for none. pp: ranks of a pipeline, which runs a batch in micro_batches times accumulate. more_plan:
    text of a Plan with what has no option of its own. Paths are absolute once `prepare` has seen them; None stands for
    "decide for me".
    """

    model: str = "llama-tiny"
    dropout: float | None = None
    data: tuple[str, ...] = ()
    tokenizer: str | None = None
    cache_dir: str | None = None
    val_fraction: float = 0.05
    seq_len: int = 128
    batch_size: int = 8
    accumulate: int = 1
    steps: int = 600
    lr: float = 3e-3
    min_lr_ratio: float = 0.1
    warmup: int = 30
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    clip: float = 1.0
    dtype: str = "float32"
    seed: int = 0
    dp: int = 1
    tp: int = 1
    zero: int = 0
    pp: int = 1
    replicate: int = 1
    schedule: str = "1f1b"
    micro_batches: int = 4
    split: str = "auto"
    sequence_parallel: bool = True
    recompute: bool = False
    more_plan: str = ""
    backend: str | None = None
    device: str = "auto"
    threads: int | None = None
    out: str | None = None
    eval_every: int = 100
    eval_batches: int = 16
    save_every: int = 200
    keep: int = 3
    log_every: int = 20
    prompt: str | None = None
    sample_tokens: int = 200
    temperature: float = 0.8

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> TrainConfig:
        """Ignores settings it does not know: a checkpoint of another version still loads."""
        names = {field.name for field in dataclasses.fields(cls)}
        known = {name: value for name, value in values.items() if name in names}
        if "data" in known:
            known["data"] = tuple(known["data"])
        return cls(**known)

    def world_size(self) -> int:
        return self.dp * self.tp * self.pp

    def plan(self, loss_parallel: bool = False) -> Plan:
        """How the ranks share the work. loss_parallel: the model's head is cut, and the loss takes that."""
        return dataclasses.replace(
            Plan.parse(self.more_plan), pp=self.pp, dp=self.dp, tp=self.tp, zero=self.zero, replicate=self.replicate,
            schedule=self.schedule if self.pp > 1 else "1f1b", split=self.split if self.pp > 1 else "auto",
            micro_batches=self.accumulate * (self.micro_batches if self.pp > 1 else 1),
            sequence_parallel=self.sequence_parallel and self.tp > 1, loss_parallel=loss_parallel,
            recompute=self.recompute,
        )  # fmt: skip

    def micro_batch(self) -> int:
        """Sequences that the busiest rank runs at once."""
        return math.ceil(math.ceil(self.batch_size / self.dp) / self.accumulate)


# A different value of these on resuming would train something else than the checkpoint's run.
FROZEN = ("dropout", "tokenizer", "val_fraction", "seq_len", "seed")


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0))


def flag(name: str) -> str:
    """The option of a setting: seq_len -> --seq-len."""
    return "--" + name.replace("_", "-")


def check(config: TrainConfig, max_ranks: int | None = None) -> None:
    """Raises TrainError for a value that can't work. max_ranks: default 8 per core."""
    for name in (
        "seq_len", "batch_size", "accumulate", "steps", "dp", "tp", "pp", "replicate", "micro_batches", "keep",
        "log_every",
    ):  # fmt: skip
        _at_least(config, name, 1)
    for name in ("warmup", "eval_every", "eval_batches", "save_every", "sample_tokens", "seed"):
        _at_least(config, name, 0)
    if config.zero not in (0, 1, 2, 3):
        raise TrainError(f"--zero must be 1, 2 or 3, or 0 for none, got {config.zero}")
    try:
        config.plan().check()
    except PlanError as error:
        raise TrainError(as_options(error, config.plan())) from error
    if config.threads is not None:
        _at_least(config, "threads", 1)
    for name in ("lr", "eps", "temperature"):
        _between(config, name, 0.0, math.inf, open_low=True)
    for name in ("weight_decay", "clip"):
        _between(config, name, 0.0, math.inf)
    for name in ("beta1", "beta2"):
        _between(config, name, 0.0, 1.0, open_high=True)
    _between(config, "min_lr_ratio", 0.0, 1.0)
    _between(config, "val_fraction", 0.0, 0.5, open_low=True)
    if config.dropout is not None:
        _between(config, "dropout", 0.0, 1.0, open_high=True)
    limit = MAX_RANKS_PER_CORE * cores() if max_ranks is None else max_ranks
    if config.world_size() > limit:
        given = " x ".join(f"--{n} {v}" for n, v in (("dp", config.dp), ("tp", config.tp), ("pp", config.pp)) if v > 1)
        name = "pp" if config.pp > 1 else "tp" if config.dp == 1 else "dp"
        rest = " and leave out --tp" if config.dp > 1 and config.tp > 1 else ""
        raise TrainError(
            f"{given} is more than {MAX_RANKS_PER_CORE} ranks for each of the {cores()} cores here: "
            f"use --{name} {cores()}{rest}, or torchrun over more machines"
        )
    if config.batch_size < config.dp * config.accumulate:
        raise TrainError(
            f"--batch-size {config.batch_size} gives some of --dp {config.dp} ranks x --accumulate {config.accumulate} "
            f"no sequence: use --batch-size {config.dp * config.accumulate} or more, or fewer ranks"
        )


def as_options(error: PlanError, plan: Plan) -> str:
    """What is wrong with a plan, in the words of the command line."""
    words = (word.partition("=") for word in error.cell.split())
    cell = " ".join(f"{flag(name)} {value}" if value else "--tp" if name == "tp" else name for name, _, value in words)
    changes = [] if error.nearest is None else plan.diff(error.nearest).splitlines()
    advice = " ".join(_advice(line.partition(":")[0], line.rpartition(" -> ")[2]) for line in changes)
    return f"{cell or error.cell}: {error.why}" + (f": use {advice}" if advice else "")


def _advice(name: str, value: str) -> str:
    """A changed field of a plan; some have no option of their own."""
    if name in {field.name for field in dataclasses.fields(TrainConfig)}:
        return f"{flag(name)} {value}"
    return f"--plan without {name}" if value == "null" else f'--plan "{name}={value}"'


def _at_least(config: TrainConfig, name: str, low: int) -> None:
    value = getattr(config, name)
    if value < low:
        raise TrainError(f"{flag(name)} must be at least {low}, got {value}")


def _between(
    config: TrainConfig, name: str, low: float, high: float, open_low: bool = False, open_high: bool = False
) -> None:
    value = getattr(config, name)
    inside = low <= value <= high and not (open_low and value == low) and not (open_high and value == high)
    if not inside or not math.isfinite(value):
        left = "above" if open_low else "at least"
        right = "" if high == math.inf else f" and {'below' if open_high else 'at most'} {high:g}"
        raise TrainError(f"{flag(name)} must be {left} {low:g}{right}, got {value:g}")
