"""Under torchrun --max-restarts a run goes on from its last checkpoint after a rank has died."""

import os
import signal
import subprocess
import sys
import time

import pytest

from .helpers import curve, environment, rows, run_train
from .test_stop import ranks_of

STEPS, SAVED = 24, 4


def steps_done(run):
    if not (run / "metrics.jsonl").exists():
        return 0
    return max((row["step"] for row in rows(run) if row["split"] == "train"), default=0)


@pytest.mark.slow
@pytest.mark.parametrize("kill_at", [2, 10])
def test_a_killed_rank_costs_the_steps_since_the_last_checkpoint(options, tmp_path, kill_at):
    """kill_at 2: before the first checkpoint; the run begins anew."""
    options = [*options, "--steps", str(STEPS), "--save-every", str(SAVED), "--dropout", "0.1", "--keep", "2"]
    options += ["--tp", "2", "--zero", "1", "--sample-tokens", "0"]
    whole = run_train(*options, "--dp", "2", "--out", "whole", cwd=tmp_path)
    assert whole.returncode == 0, whole.stderr
    words = ["-m", "torch.distributed.run", "--standalone", "--max-restarts", "2", "--nproc-per-node", "4"]
    process = subprocess.Popen(
        [sys.executable, *words, "-m", "pypar", "train", *options, "--out", "run"],
        cwd=tmp_path, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    run = tmp_path / "run"
    deadline = time.monotonic() + 120
    while steps_done(run) < kill_at and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.02)
    victims = ranks_of(process)
    assert len(victims) == 4, process.communicate()
    os.kill(victims[3], signal.SIGKILL)
    out, error = process.communicate(timeout=240)
    assert process.returncode == 0, error
    if kill_at > SAVED:
        assert "resumed from" in out and out.count("resumed from") == 1
    assert curve(run) == curve(tmp_path / "whole")
