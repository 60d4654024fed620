"""Checkpoint folders: written aside, synced, renamed; read only when every file has its recorded size and sha256.

RUN/checkpoints/step-00000100/
    model.safetensors  config.json     what transformers loads: a checkpoint is a saved model
    optimizer.safetensors              AdamW's moments, by parameter name
    state.json                         step, data position, settings, RNG states of every rank
    manifest.json                      size and sha256 of each file above
Nothing in it is unpickled.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pypar.atomic import sync
from pypar.trainer.errors import TrainError, reason

FORMAT = 1


def folder_of(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:08d}"


def step_of(path: Path) -> int:
    """-1 for what is no checkpoint's name"""
    digits = path.name.removeprefix("step-")
    return int(digits) if path.name.startswith("step-") and digits.isdigit() else -1


def all_of(run: Path) -> list[Path]:
    """The run's checkpoints, oldest step first."""
    folder = run / "checkpoints"
    found = [path for path in folder.iterdir() if step_of(path) >= 0] if folder.is_dir() else []
    return sorted(found, key=step_of)


def write(run: Path, step: int, fill: Callable[[Path], None], keep: int) -> Path:
    """fill(folder) writes the files; then they become the checkpoint of `step`, and only the newest `keep` stay.

    Checkpoints of later steps belong to a branch that a resumed run has left, and go as well.
    Raises TrainError; then every earlier checkpoint is as it was.
    """
    target = folder_of(run, step)
    aside = target.with_name(f".tmp-{target.name}-{os.getpid()}")
    try:
        clean(run)
        aside.mkdir(parents=True)
        fill(aside)
        files = {path.name: _measure(path) for path in sorted(aside.iterdir())}
        (aside / "manifest.json").write_text(json.dumps({"format": FORMAT, "files": files}, indent=1))
        for path in aside.iterdir():
            sync(path)
        sync(aside)
        _replace(aside, target)
    except Exception as error:
        shutil.rmtree(aside, ignore_errors=True)
        last = latest(run)
        safe = f"the last checkpoint, {last}, is intact" if last else "there is no earlier checkpoint"
        raise TrainError(
            f"cannot save the checkpoint of step {step}: {reason(error)}; {safe}: free space, then --resume", 1
        ) from error
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    for path in all_of(run)[:-keep]:
        shutil.rmtree(path, ignore_errors=True)
    return target


def latest(run: Path) -> Path | None:
    found = all_of(run)
    return found[-1] if found else None


def clean(run: Path) -> None:
    """Removes what a killed save left. Only for the one process that writes to the run."""
    restore(run)
    folder = run / "checkpoints"
    if folder.is_dir():
        for path in [*folder.glob(".old-*"), *folder.glob(".tmp-*")]:
            shutil.rmtree(path)


def restore(run: Path) -> None:
    """Puts back a checkpoint that a killed save had moved away and not yet replaced."""
    folder = run / "checkpoints"
    for path in folder.glob(".old-*") if folder.is_dir() else ():
        original = folder / path.name.removeprefix(".old-")
        if not original.exists():
            path.rename(original)


def verify(path: Path) -> None:
    """Raises TrainError that names the damaged file and the newest intact checkpoint before."""
    what = problem(path)
    if what:
        earlier = [other for other in all_of(path.parent.parent) if step_of(other) < step_of(path)]
        intact = next((other for other in reversed(earlier) if not problem(other)), None)
        remedy = f"go on from --resume {intact}" if intact else "no earlier one is intact: start a new run"
        raise TrainError(f"checkpoint {path} is corrupt: {what}; {remedy}")


def problem(path: Path) -> str:
    """ "" for an intact checkpoint, else what is wrong with which file."""
    try:
        manifest = json.loads((path / "manifest.json").read_text())
        version, files = manifest["format"], manifest["files"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"manifest.json: {reason(error)}"
    if version != FORMAT:
        return f"manifest.json has format {version}, this pypar reads {FORMAT}"
    for name, expected in files.items():
        try:
            found = _measure(path / name)
        except OSError as error:
            return f"{name}: {error.strerror}"
        if found["bytes"] != expected["bytes"]:
            return f"{name} has {found['bytes']} bytes instead of {expected['bytes']}"
        if found["sha256"] != expected["sha256"]:
            return f"{name} does not have its recorded sha256"
    return ""


def write_state(folder: Path, state: dict[str, Any]) -> None:
    (folder / "state.json").write_text(json.dumps(state))


def read_state(path: Path) -> dict[str, Any]:
    """state.json of a verified checkpoint, with config.json as "model"."""
    state = json.loads((path / "state.json").read_text())
    state["model"] = json.loads((path / "config.json").read_text())
    return state


def find(resume: str, runs: list[Path]) -> Path:
    """The checkpoint that --resume means. resume: "latest", a checkpoint or a run; runs: where "latest" looks.

    Raises TrainError when there is none.
    """
    if resume == "latest":
        for run in runs:
            restore(run)
        newest = max(runs, key=lambda run: _time_of(latest(run)), default=None)
        found = latest(newest) if newest else None
        if found is None:
            where = ", ".join(map(str, runs)) or "runs/"
            raise TrainError(f"--resume: no checkpoint in {where}: give --resume PATH, or leave it out for a new run")
        return found
    path = Path(resume)
    if not path.is_dir():
        raise TrainError(f"--resume {resume}: no such folder")
    if (path / "manifest.json").is_file() or step_of(path) >= 0:
        return path
    restore(path)
    found = latest(path)
    if found is None:
        raise TrainError(f"--resume {resume}: neither a checkpoint nor a run folder with checkpoints")
    return found


def run_of(path: Path) -> Path | None:
    """The run folder that a checkpoint lies in, or None when it was copied elsewhere."""
    return path.parent.parent if path.parent.name == "checkpoints" else None


def _measure(path: Path) -> dict[str, Any]:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
        return {"bytes": file.tell(), "sha256": digest.hexdigest()}


def _replace(aside: Path, target: Path) -> None:
    old = target.with_name(f".old-{target.name}")
    later = [path for path in target.parent.iterdir() if step_of(path) > step_of(target)]
    if target.exists():
        target.rename(old)
    aside.rename(target)
    sync(target.parent)
    for path in [old, *later]:
        shutil.rmtree(path, ignore_errors=True)


def _time_of(path: Path | None) -> float:
    return path.stat().st_mtime if path else 0.0
