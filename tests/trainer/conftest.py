"""A model and a text that are small enough to train in a second."""

import json
from pathlib import Path

import pytest

from pypar.trainer.main import main

from .helpers import BACKEND, error_line

MODEL = {
    "model_type": "gpt2",
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 2,
    "n_positions": 64,
    "vocab_size": 257,
    "bos_token_id": 256,
    "eos_token_id": 256,
}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A config.json with 36 thousand parameters; GPT-2's dropout of 0.1 is on."""
    path = tmp_path / "config.json"
    path.write_text(json.dumps(MODEL))
    return path


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """A folder with 40 documents of about 500 bytes."""
    folder = tmp_path / "text"
    folder.mkdir()
    for number in range(40):
        lines = (f"line {line} of document {number}: {number * line}" for line in range(16))
        (folder / f"{number:02d}.txt").write_text("\n".join(lines))
    return folder


@pytest.fixture
def options(tmp_path: Path, model: Path, text: Path) -> list[str]:
    """Of a run of 10 steps that checkpoints at 5 and 10."""
    return [
        *("--model", str(model), "--data", str(text), "--cache-dir", str(tmp_path / "cache")),
        *("--seq-len", "32", "--batch-size", "6", "--steps", "10", "--warmup", "2", "--lr", "1e-3"),
        *("--eval-every", "5", "--eval-batches", "2", "--save-every", "5", "--sample-tokens", "8"),
        *("--threads", "1", "--backend", BACKEND),
    ]


@pytest.fixture
def refused(capsys, monkeypatch, tmp_path):
    """refused(*arguments) -> the error line; fails when the run is not refused or says more than a line."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYPAR_DEBUG", raising=False)

    def run(*arguments: str, exit_code: int = 2) -> str:
        capsys.readouterr()
        code = main(list(arguments))
        stderr = capsys.readouterr().err
        assert code == exit_code, stderr
        return error_line(stderr)

    return run
