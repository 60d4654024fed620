"""Ranks that are stopped, killed or started by torchrun: one line, an exit code, no process left, checkpoints whole."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pypar.trainer import checkpoint

from .helpers import command, environment, error_line, rows

pytestmark = pytest.mark.slow


def start(options, folder: Path, *more: str) -> subprocess.Popen:
    """A run that would take minutes, returned when its first checkpoint is there."""
    process = subprocess.Popen(
        command(*options, "--steps", "100000", "--save-every", "20", "--out", "run", *more),
        cwd=folder,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    deadline = time.monotonic() + 120
    while not checkpoint.all_of(folder / "run"):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.1)
    return process


def ranks_of(process: subprocess.Popen) -> list[int]:
    """The processes of the launcher's ranks, by rank."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    found = {}
    for pid in children:
        words = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        rank = next((word for word in words if word.startswith(b"RANK=")), None)
        if rank:
            found[int(rank[5:])] = int(pid)
    return [found[rank] for rank in sorted(found)]


def all_gone(pids: list[int]) -> bool:
    deadline = time.monotonic() + 15
    while any(os.path.exists(f"/proc/{pid}") for pid in pids):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


@pytest.mark.parametrize(
    ("number", "layout"),
    [(signal.SIGINT, "--dp 2"), (signal.SIGTERM, "--dp 2"), (signal.SIGINT, "--dp 1"), (signal.SIGINT, "--tp 2")],
)
def test_signal_ends_the_run_cleanly(options, tmp_path, number, layout):
    process = start(options, tmp_path, *layout.split())
    ranks = ranks_of(process)
    assert len(ranks) == (0 if layout == "--dp 1" else 2)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    line = error_line(stderr)
    assert f"stopped by {number.name}; go on with --resume" in line
    assert all_gone(ranks)
    checkpoint.verify(Path(line.split()[-1]))


@pytest.mark.parametrize("layout", ["--dp 2", "--tp 2", "--dp 2 --tp 2"])
def test_killed_rank_ends_the_run(options, tmp_path, layout):
    process = start(options, tmp_path, *layout.split())
    ranks = ranks_of(process)
    os.kill(ranks[1], signal.SIGKILL)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "rank 1 was killed by SIGKILL" in error_line(stderr)
    assert all_gone(ranks)


def test_killed_launcher_leaves_no_rank(options, tmp_path):
    process = start(options, tmp_path, "--dp", "2")
    ranks = ranks_of(process)
    process.kill()
    process.communicate(timeout=60)
    assert all_gone(ranks)


@pytest.mark.parametrize(
    ("layout", "more"), [("dp 2 x tp 1", []), ("dp 1 x tp 2", ["--tp", "2", "--no-sequence-parallel"])]
)
def test_under_torchrun(options, tmp_path, layout, more):
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "pypar", "train"]
    done = subprocess.run(
        [sys.executable, *words, *options, "--out", "run", *more],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    assert f"2 ranks ({layout})" in done.stdout and done.stdout.count("step 10/10  loss") == 1
    assert len(rows(tmp_path / "run")) == 13, "10 steps and 3 validations, each written once"
