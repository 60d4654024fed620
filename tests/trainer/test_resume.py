"""10 steps == 5 steps, a new process, 5 steps: bit for bit, on two ranks with dropout, in either direction."""

import json
import shutil

import pytest

from .helpers import curve, run_train


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["dp 2 x tp 1", "dp 1 x tp 2"])
def test_resume_continues_bit_for_bit(options, tmp_path, layout):
    ranks = layout.replace(" x ", " ").replace("dp", "--dp").replace("tp", "--tp").split()
    straight = run_train(*options, *ranks, "--out", "straight", cwd=tmp_path)
    assert straight.returncode == 0 and not straight.stderr, straight.stderr
    half = tmp_path / "half"
    shutil.copytree(tmp_path / "straight", half)
    shutil.rmtree(half / "checkpoints" / "step-00000010")
    # No other option: a resumed run keeps its settings, two ranks included.
    resumed = run_train("--resume", "--out", "half", cwd=tmp_path)
    assert resumed.returncode == 0 and not resumed.stderr, resumed.stderr
    assert f"2 ranks ({layout}" in resumed.stdout and "resumed from" in resumed.stdout
    assert "loss nan" not in resumed.stdout

    one, other = (tmp_path / name / "checkpoints" / "step-00000010" for name in ("straight", "half"))
    for name in ("model.safetensors", "optimizer.safetensors", "config.json"):
        assert (one / name).read_bytes() == (other / name).read_bytes(), name
    states = [json.loads((path / "state.json").read_text()) for path in (one, other)]
    for key in ("step", "position", "rng", "world_size", "data"):
        assert states[0][key] == states[1][key], key
    assert curve(tmp_path / "straight") == curve(half)
    assert (tmp_path / "straight/sample.txt").read_bytes() == (half / "sample.txt").read_bytes()
