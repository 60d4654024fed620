"""Runs `pypar train` in a process of its own, and reads what a run wrote."""

import json
import os
import subprocess
import sys
from pathlib import Path

# The process group of the tests.
BACKEND = "pypar"


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "pypar", "train", *arguments]


def environment() -> dict[str, str]:
    names = ("PYPAR_DEBUG", "RANK", "WORLD_SIZE", "LOCAL_RANK")
    return {name: value for name, value in os.environ.items() if name not in names} | {"OMP_NUM_THREADS": "1"}


def run_train(*arguments: str, cwd: Path, **keywords) -> subprocess.CompletedProcess:
    return subprocess.run(
        command(*arguments), cwd=cwd, env=environment(), capture_output=True, text=True, timeout=240, **keywords
    )


def error_line(stderr: str) -> str:
    """The one line that a failed run may print."""
    lines = stderr.strip().splitlines()
    assert len(lines) == 1, stderr
    assert lines[0].startswith("pypar train: error: "), stderr
    return lines[0]


def rows(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def curve(run: Path) -> list[dict]:
    """The rows without what a clock put in."""
    return [{k: v for k, v in row.items() if k not in ("tokens_per_s", "unix_time")} for row in rows(run)]
