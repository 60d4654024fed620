"""What a user can get wrong: one line that says what to do, and nothing lost."""

import errno
import json
import os

import pytest

from pypar.trainer import state
from pypar.trainer.config import cores
from pypar.trainer.main import main

from .helpers import error_line, rows, run_train


def test_no_such_data(refused, options, tmp_path):
    assert f"--data {tmp_path / 'nowhere'}: no such file or folder" in refused(*options, "--data", "nowhere")


def test_empty_data(refused, options, tmp_path):
    (tmp_path / "folder").mkdir()
    assert "folder: no file in it" in refused(*options, "--data", "folder")
    (tmp_path / "folder" / "a.bin").write_bytes(b"\0\0")
    (tmp_path / "folder" / "b.txt").touch()
    assert "no text in it (1 binary, 1 empty)" in refused(*options, "--data", "folder")


def test_sequence_longer_than_the_data(refused, options, tmp_path):
    (tmp_path / "short.txt").write_text("a" * 99)
    line = refused(*options, "--data", "short.txt", "--seq-len", "64")
    assert "the data has 100 tokens" in line and "--seq-len 49 or less" in line


def test_sequence_longer_than_the_model(refused, options):
    assert "--seq-len 65 is longer than the 64 positions" in refused(*options, "--seq-len", "65")


def test_unknown_model(refused, tmp_path):
    assert "did you mean llama-tiny?" in refused("--model", "lama-tiny")
    assert "there are llama-tiny, llama-small, gpt2-tiny" in refused("--model", "zzz")
    (tmp_path / "bad.json").write_text("[1]")
    assert "bad.json is no config" in refused("--model", "bad.json")
    (tmp_path / "empty").mkdir()
    assert "has no config.json" in refused("--model", "empty")


def test_vocabulary_that_is_too_small(refused, options, tmp_path, model):
    small = json.loads(model.read_text()) | {"vocab_size": 100}
    model.write_text(json.dumps(small))
    assert "has a vocabulary of 100, the tokens need 257" in refused(*options)


def test_more_ranks_than_sense(refused):
    limit = 8 * cores()
    line = refused("--dp", str(limit + 1), "--batch-size", "1000")
    assert f"--dp {limit + 1}" in line and f"use --dp {cores()}" in line
    line = refused("--dp", "3", "--batch-size", "2")
    assert "--batch-size 2 gives some of --dp 3 ranks" in line and "--batch-size 3 or more" in line
    assert "--dp must be at least 1, got 0" in refused("--dp", "0")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--stpes", "3"], "unrecognized arguments: --stpes 3 (see pypar train --help)"),
        (["--steps", "many"], "invalid int value: 'many'"),
        (["--lr", "-1"], "--lr must be above 0, got -1"),
        (["--lr", "nan"], "--lr must be above 0, got nan"),
        (["--val-fraction", "0.9"], "--val-fraction must be above 0 and at most 0.5, got 0.9"),
        (["--dropout", "1"], "--dropout must be at least 0 and below 1, got 1"),
        (["--backend", "glue"], "no process group 'glue' for --backend: there are"),
        (["--tokenizer", "absent.json"], "absent.json: No such file or directory"),
        (["--resume"], "no checkpoint in runs/"),
        (["--resume", "absent"], "--resume absent: no such folder"),
    ],
)
def test_settings_that_cannot_work(refused, arguments, message):
    assert message in refused(*arguments)


def test_missing_extra(refused, monkeypatch):
    from pypar.trainer import model

    monkeypatch.setattr(model, "EXTRA", ("transformers", "no_such_package"))
    assert refused() == "pypar train: error: no_such_package not installed: pip install pypar[train]"


def test_output_that_cannot_be_used(refused, options, tmp_path):
    (tmp_path / "file").touch()
    assert "cannot write to --out" in refused(*options, "--out", "file", exit_code=1)
    assert "choose another --cache-dir" in refused(*options, "--cache-dir", "file", exit_code=1)
    assert main([*options, "--out", "run", "--steps", "1"]) == 0
    assert "holds a run already: --resume goes on with it" in refused(*options, "--out", "run")
    from pathlib import Path

    from pypar.trainer.prepare import lock

    with lock(Path("run")):
        assert "another pypar train is writing to" in refused("--resume", "run", "--steps", "2")


def test_checkpoints_that_cannot_be_resumed(refused, options, tmp_path, text):
    assert main([*options, "--out", "run"]) == 0
    capable = tmp_path / "run" / "checkpoints" / "step-00000005"
    line = refused("--resume", "run", "--model", "llama-tiny", "--steps", "20")
    assert "is of another model" in line and "model_type gpt2, not llama" in line
    assert "with --seq-len 32, not 16" in refused("--resume", "run", "--seq-len", "16", "--steps", "20")
    assert "has all of its 10 steps: give more --steps" in refused("--resume", "run")
    (text / "00.txt").write_text("changed")
    assert "the data is not what checkpoint" in refused("--resume", "run", "--steps", "20")

    weights = tmp_path / "run" / "checkpoints" / "step-00000010" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    line = refused("--resume", "run", "--steps", "20")
    assert f"is corrupt: model.safetensors does not have its recorded sha256; go on from --resume {capable}" in line


def test_loss_that_is_not_finite(refused, options):
    line = refused(*options, "--lr", "1e30", "--out", "run", exit_code=1)
    assert "at step 2: lower --lr" in line or "at step 3: lower --lr" in line


def test_disk_full(refused, options, tmp_path, monkeypatch):
    """The second checkpoint meets a full disk."""
    kept = state.save_optimizer
    calls = []

    def full(*arguments):
        calls.append(1)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        kept(*arguments)

    monkeypatch.setattr("pypar.trainer.loop.save_optimizer", full)
    line = refused(*options, "--out", "run", exit_code=1)
    assert "cannot save the checkpoint of step 10: No space left on device" in line
    assert "step-00000005, is intact" in line
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    assert main(["--resume", "run"]) == 0
    assert rows(tmp_path / "run")[-1]["step"] == 10


@pytest.mark.slow
def test_disk_full_on_two_ranks(options, tmp_path, monkeypatch):
    """Rank 0 cannot write its checkpoint to the end; rank 1 must not wait for it."""
    # Loaded by every Python that has this folder on its path, so by the ranks too.
    (tmp_path / "sitecustomize.py").write_text(
        "import errno, os\n"
        "fsync = os.fsync\n"
        "def full(handle):\n"
        "    if 'checkpoints' in os.readlink(f'/proc/self/fd/{handle}'):\n"
        "        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))\n"
        "    fsync(handle)\n"
        "os.fsync = full\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    done = run_train(*options, "--dp", "2", "--out", "run", cwd=tmp_path)
    assert done.returncode == 1
    line = error_line(done.stderr)
    assert "cannot save the checkpoint of step 5" in line and "No space left on device" in line
    assert not list((tmp_path / "run" / "checkpoints").iterdir())


def test_debug_shows_the_traceback(options, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main([*options, "--data", "nowhere", "--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err
