"""Everything that can be refused before a rank starts: settings, model, data, checkpoint, output folder."""

from __future__ import annotations

import dataclasses
import fcntl
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from pypar.trainer import cache, checkpoint
from pypar.trainer.config import FROZEN, TrainConfig, check, flag
from pypar.trainer.data import split
from pypar.trainer.errors import TrainError, reason
from pypar.trainer.metrics import NAME
from pypar.trainer.model import (
    check_tensor_parallel,
    describe,
    own_tokenizer,
    require_extra,
    same_model,
    weights_folder,
)
from pypar.trainer.pipeline import check_pipeline
from pypar.trainer.presets import PRESETS
from pypar.trainer.restarts import Earlier
from pypar.trainer.tokens import load_tokens

_PATHS = ("tokenizer", "cache_dir", "out")


@dataclass(frozen=True)
class Job:
    """What the ranks need. model: the full model configuration; weights, resume: folders or None; cache: of tokens."""

    config: TrainConfig
    model: dict[str, Any]
    weights: str | None
    cache: str
    resume: str | None
    debug: bool

    def to_json(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "config": self.config.to_json()}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Job:
        return cls(**{**values, "config": TrainConfig.from_json(values["config"])})


def prepare(
    given: dict[str, Any],
    resume: str | None,
    debug: bool,
    world_size: int | None = None,
    again: Earlier | None = None,
) -> Job:
    """Checks all of it, tokenises the data, chooses and makes the output folder. Raises TrainError.

    given: the settings of the command line. world_size: of torchrun, which with --tp decides --dp. again: torchrun has
    started the ranks anew, and the run goes on from the newest checkpoint that it has written, if there is one.
    """
    require_extra()
    given = _absolute(given)
    if again:
        given["out"] = str(again.out)
    found = again.newest() if again else None
    if found is None:
        found = _find_checkpoint(resume, given)
    state = checkpoint.read_state(found) if found else None
    config = TrainConfig.from_json((state["config"] if state else {}) | given)
    if world_size is not None:
        config = dataclasses.replace(config, dp=_dp_of(config, given.get("dp"), world_size))
    check(config, max_ranks=world_size)
    if state:
        _same_run(given, config, state, found)
        if state["step"] >= config.steps and not again:  # a rank may die behind the last checkpoint, too
            raise TrainError(f"checkpoint {found} has all of its {config.steps} steps: give more --steps to go on")
    config = dataclasses.replace(config, tokenizer=config.tokenizer or own_tokenizer(config.model))

    tokens = load_tokens(config.tokenizer)
    if state:
        model, weights = state["model"], None
    else:
        weights = weights_folder(config.model)
        model = describe(config.model, tokens.vocab_size, tokens.end, config.seq_len, config.dropout)
    check_tensor_parallel(config.model, model, config.plan())
    check_pipeline(config.model, model, config)
    _check_backend(config.backend)
    folder = Path(config.cache_dir) if config.cache_dir else cache.default_folder()
    built = cache.build(config.data, tokens, folder)
    loaded = cache.load(built)
    split(loaded, config.seq_len, config.val_fraction, config.seed)
    if state and state["data"]["sha256"] != loaded.meta["sha256"]:
        raise TrainError(
            f"the data is not what checkpoint {found} was trained on ({loaded.meta['num_tokens']} tokens, "
            f"{state['data']['num_tokens']} then): give the same --data, or start a new run with --model {found}"
        )
    out = _output(config, given.get("out"), found, again is not None)
    return Job(
        dataclasses.replace(config, out=str(out)), model, weights, str(built), str(found) if found else None, debug
    )


def _dp_of(config: TrainConfig, dp: int | None, world_size: int) -> int:
    """The data-parallel ranks among the world_size ranks of torchrun. dp: what the command line says, if anything."""
    others = config.tp * config.pp
    said = " x ".join(f"--{n} {v}" for n, v in (("tp", config.tp), ("pp", config.pp)) if v != 1) or "--tp 1"
    if others < 1 or world_size % others:
        fit = [str(n) for n in range(1, world_size + 1) if world_size % n == 0]
        option = "--tp" if config.pp == 1 else "--tp x --pp"
        raise TrainError(
            f"{said} does not divide the {world_size} {'rank' if world_size == 1 else 'ranks'} of torchrun: "
            f"use {option} {', '.join(fit[:-1])}{' or ' if fit[:-1] else ''}{fit[-1]}, "
            "or start another number of ranks"
        )
    if dp is not None and dp * others != world_size:
        shown = f" x {said}" if others > 1 else ""
        raise TrainError(f"--dp {dp}{shown}, but torchrun started {world_size} ranks: leave --dp out")
    return world_size // others


def lock(run: Path) -> IO[str]:
    """Keeps a second run out of the same folder while the returned file is open. Raises TrainError."""
    file = open(run / ".lock", "w")  # noqa: SIM115
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
        raise TrainError(f"another pypar train is writing to {run}: choose another --out") from error
    return file


def _absolute(given: dict[str, Any]) -> dict[str, Any]:
    """A resumed run may be started in another folder: paths are stored absolute."""
    done = dict(given)
    for name in _PATHS:
        if done.get(name) and done[name] != "bytes":
            done[name] = os.path.abspath(done[name])
    if done.get("data"):
        done["data"] = tuple(os.path.abspath(path) for path in done["data"])
    if "model" in done and done["model"] not in PRESETS and os.path.exists(done["model"]):
        done["model"] = os.path.abspath(done["model"])
    return done


def _find_checkpoint(resume: str | None, given: dict[str, Any]) -> Path | None:
    if resume is None:
        return None
    if given.get("out"):
        runs = [Path(given["out"])]
    else:
        runs = [path for path in Path("runs").glob("*") if (path / "checkpoints").is_dir()]
    found = checkpoint.find(resume, runs).absolute()
    checkpoint.verify(found)
    return found


def _same_run(given: dict[str, Any], config: TrainConfig, state: dict[str, Any], found: Path | None) -> None:
    stored = TrainConfig.from_json(state["config"])
    if "model" in given and given["model"] != stored.model:
        wanted = describe(
            given["model"], state["model"]["vocab_size"], state["model"]["eos_token_id"], stored.seq_len, stored.dropout
        )
        difference = same_model(state["model"], wanted)
        if difference:
            raise TrainError(
                f"checkpoint {found} is of another model, {stored.model} ({difference}): "
                f"leave out --model {given['model']}, or start a new run without --resume"
            )
    for name in FROZEN:
        if name in given and getattr(config, name) != getattr(stored, name):
            raise TrainError(
                f"checkpoint {found} was trained with {flag(name)} {getattr(stored, name)}, not {given[name]}: "
                f"leave out {flag(name)}, or start a new run with --model {found}"
            )


def _check_backend(backend: str | None) -> None:
    import torch.distributed as dist

    import pypar  # noqa: F401  (registers its own)

    for part in (backend or "").split(","):
        name = part.split(":")[-1].lower()
        if name and name not in dist.Backend.backend_list:
            raise TrainError(
                f"no process group {name!r} for --backend: there are {', '.join(dist.Backend.backend_list[1:])}"
            )


def _output(config: TrainConfig, wanted: str | None, found: Path | None, again: bool) -> Path:
    """The run's folder, made and writable. wanted: --out; without it a resumed run goes on where it lies. again: the
    run itself is there already."""
    run = checkpoint.run_of(found) if found else None
    if wanted:
        out = Path(wanted)
        if _holds_a_run(out) and out != run and not again:
            raise TrainError(
                f"--out {out} holds a run already: --resume goes on with it, another --out starts a new one"
            )
    elif run:
        out = run
    else:
        name = config.model if config.model in PRESETS else Path(config.model).stem
        out = next(path for path in _numbered(Path("runs").absolute() / name) if not _holds_a_run(path))
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock(out).close()
    except OSError as error:
        raise TrainError(f"cannot write to --out {out}: {reason(error)}", 1) from error
    return out


def _numbered(path: Path) -> Iterator[Path]:
    yield path
    number = 2
    while True:
        yield path.with_name(f"{path.name}-{number}")
        number += 1


def _holds_a_run(path: Path) -> bool:
    return (path / NAME).exists() or (path / "checkpoints").exists()
