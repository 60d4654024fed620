"""A checkpoint's folder: data written beside the old, and a manifest that is replaced in one step.

CHECKPOINT/
    manifest.json        format, which data folder counts, size and sha256 of each of its files
    data-000007/         what torch.distributed.checkpoint reads: .metadata and __RANK_0.distcp
        state.pt         settings and step counts of the optimizer, random states, the user's extra
        config.json      the model's, where it has one

Until the new manifest is in place the old one and its data are whole; what a killed save left goes with the next.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

from pypar.atomic import sync, write_file
from pypar.hybrid.together import CheckpointError, reason

FORMAT = 1
KIND = "pypar.save"
MANIFEST = "manifest.json"
STATE, CONFIG = "state.pt", "config.json"


def read_manifest(path: Path) -> dict[str, Any]:
    """Raises CheckpointError for what is no checkpoint, or one of another format."""
    if not path.is_dir():
        raise CheckpointError(f"there is no folder {path}")
    try:
        manifest = json.loads((path / MANIFEST).read_text())
    except FileNotFoundError:
        raise CheckpointError(f"{path} has no {MANIFEST}: no checkpoint, or one whose first save did not end") from None
    except ValueError as error:
        raise CheckpointError(f"{MANIFEST} is damaged: {reason(error)}") from error
    if not isinstance(manifest, dict) or manifest.get("kind") != KIND:
        raise CheckpointError(f"{path} is no checkpoint of pypar.save: its {MANIFEST} is another program's")
    if manifest.get("format") != FORMAT:
        raise CheckpointError(f"it has format {manifest.get('format')}, and this pypar reads {FORMAT}")
    if not isinstance(manifest.get("files"), dict) or not isinstance(manifest.get("data"), str):
        raise CheckpointError(f"{MANIFEST} is damaged: it names no files")
    return manifest


def check_files(data: Path, files: dict[str, Any], rank: int, world_size: int) -> None:
    """This rank's share of the files has the recorded size and sha256. Raises CheckpointError."""
    if not data.is_dir():
        raise CheckpointError(f"there is no folder {data}; it must lie on a file system that all ranks share")
    for number, (name, recorded) in enumerate(sorted(files.items())):
        if number % world_size != rank:
            continue
        try:
            found = measure(data / name)
        except OSError as error:
            raise CheckpointError(f"{data.name}/{name} can't be read: {reason(error)}") from error
        if found["bytes"] != recorded["bytes"]:
            raise CheckpointError(
                f"{data.name}/{name} is damaged: it has {found['bytes']} bytes instead of {recorded['bytes']}"
            )
        if found["sha256"] != recorded["sha256"]:
            raise CheckpointError(f"{data.name}/{name} is damaged: it does not have its recorded sha256")


def begin(path: Path) -> Path:
    """A fresh data folder; what a killed save left is removed. Raises OSError, CheckpointError."""
    path.mkdir(parents=True, exist_ok=True)
    current = None
    if (path / MANIFEST).exists():
        try:
            current = json.loads((path / MANIFEST).read_text())
        except ValueError:
            pass  # damaged: its data may be good, and stay until the new ones are in place
        else:
            if not isinstance(current, dict) or current.get("kind") != KIND:
                raise CheckpointError(f"its {MANIFEST} is another program's; give another folder")
    if current is not None or not (path / MANIFEST).exists():
        _remove_other_data(path, "" if current is None else str(current.get("data")))
    for left in path.glob(f".tmp-*-{MANIFEST}"):
        left.unlink()
    numbers = [int(p.name.removeprefix("data-")) for p in _data_folders(path)]
    data = path / f"data-{max(numbers, default=0) + 1:06d}"
    data.mkdir()
    return data


def commit(data: Path, manifest: dict[str, Any]) -> None:
    """The data become the checkpoint; the ones before go. Raises OSError; then those are as they were."""
    sync(data)
    sync(data.parent)
    text = json.dumps({"kind": KIND, "format": FORMAT, "data": data.name, **manifest}, indent=1)
    write_file(data.parent / MANIFEST, text.encode())
    _remove_other_data(data.parent, data.name)


def abandon(data: Path) -> None:
    shutil.rmtree(data, ignore_errors=True)


def write(path: Path, content: bytes) -> None:
    """Raises OSError."""
    path.write_bytes(content)
    sync(path)


def measure(path: Path) -> dict[str, Any]:
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256")
        return {"bytes": os.fstat(file.fileno()).st_size, "sha256": digest.hexdigest()}


def _data_folders(path: Path) -> list[Path]:
    return [p for p in path.glob("data-*") if p.is_dir() and p.name.removeprefix("data-").isdigit()]


def _remove_other_data(path: Path, keep: str) -> None:
    for folder in _data_folders(path):
        if folder.name != keep:
            shutil.rmtree(folder, ignore_errors=True)
