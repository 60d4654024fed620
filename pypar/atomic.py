"""Files and folders that are either whole or not there, even when the power fails."""

from __future__ import annotations

import os
from pathlib import Path


def sync(path: Path) -> None:
    """fsync of a file or of a folder's list of names. Raises OSError."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_file(path: Path, content: bytes) -> None:
    """Writes aside, syncs, renames over `path`. Raises OSError; then the old content is still there."""
    aside = path.with_name(f".tmp-{os.getpid()}-{path.name}")
    try:
        aside.write_bytes(content)
        sync(aside)
        aside.replace(path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    sync(path.parent)
