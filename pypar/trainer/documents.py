"""Which files are the data."""

from __future__ import annotations

import os
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path

from pypar.trainer.errors import TrainError

# Tests repeat themselves, and installed packages differ from machine to machine.
_STDLIB_SKIP = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "lib2to3"}


def find_files(paths: Sequence[str]) -> list[Path]:
    """The files below `paths`, sorted per path; without paths the `.py` sources of the standard library.

    Hidden files and folders inside a given folder are left out. Raises TrainError for a path that is not there.
    """
    if not paths:
        return _stdlib()
    found: dict[Path, None] = {}
    for text in paths:
        path = Path(text)
        if path.is_dir():
            found.update(dict.fromkeys(sorted(_walk(path))))
        elif path.is_file():
            found[path] = None
        else:
            raise TrainError(f"--data {text}: no such file or folder")
    if not found:
        raise TrainError(f"--data {' '.join(paths)}: no file in it; name text files, or a folder that holds some")
    return list(found)


def read_text(path: Path) -> tuple[str, str]:
    """(text, ""), or ("", why it is skipped): "unreadable", "binary" or "empty"."""
    try:
        content = path.read_bytes()
    except OSError:
        return "", "unreadable"
    if b"\0" in content:
        return "", "binary"
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError:
        return "", "binary"
    return (text, "") if text else ("", "empty")


def _walk(folder: Path) -> Iterator[Path]:
    for root, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name != "__pycache__")
        yield from (Path(root) / name for name in names if not name.startswith("."))


def _stdlib() -> list[Path]:
    root = Path(sysconfig.get_paths()["stdlib"])
    files = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in _STDLIB_SKIP]
        files += [Path(folder) / name for name in names if name.endswith(".py")]
    if not files:
        raise TrainError(f"no .py sources of the standard library in {root}: give --data PATH")
    return sorted(files)
