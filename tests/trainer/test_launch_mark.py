"""Ranks that torchrun starts anew go on with the run that their launch began, and with no other."""

from pathlib import Path

import pytest

from pypar.trainer import args, checkpoint, restarts
from pypar.trainer.errors import TrainError
from pypar.trainer.main import _train, main
from pypar.trainer.prepare import prepare

from .helpers import rows


@pytest.fixture
def start(options, tmp_path, monkeypatch):
    """start(launch, attempt, *arguments) -> the job of rank 0, as `pypar train` makes it under torchrun."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "2")

    def run(launch, attempt, *arguments):
        file = tmp_path / "logs" / launch / f"attempt_{attempt}" / "0" / "error.json"
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(file))
        given, resume, debug = args.parse([*options, *arguments])
        again = restarts.earlier(given.get("out"), resume)
        job = prepare(given, resume, debug, 1, again)
        if again is None:
            restarts.remember(job.config.out)
        return job

    return run


def fit(job):
    _train("gloo", "cpu", lambda ranks: job)


def test_a_refused_start_stays_refused(options, start):
    assert main([*options, "--out", "old"]) == 0
    for attempt in range(3):
        with pytest.raises(TrainError, match="holds a run already"):
            start("a", attempt, "--out", "old", "--steps", "20")


def test_a_run_without_out_is_found_again_among_others(options, start):
    assert main([*options, "--out", "runs/other"]) == 0
    job = start("a", 0)
    assert not job.config.out.endswith("other") and job.resume is None
    assert start("a", 1).resume is None, "it has no checkpoint yet, and another run's is none of its"
    fit(job)
    again = start("a", 2)
    assert again.config.out == job.config.out and again.resume == str(checkpoint.latest(job_run(job)))


def job_run(job):
    return Path(job.config.out)


def test_a_rank_that_dies_behind_the_last_checkpoint(start):
    job = start("a", 0, "--out", "run")
    fit(job)
    before = rows(job_run(job))
    (job_run(job) / "loss.png").unlink()
    again = start("a", 1, "--out", "run")
    fit(again)
    assert (job_run(job) / "loss.png").exists() and rows(job_run(job)) == before
    with pytest.raises(TrainError, match="holds a run already"):  # another launch
        start("b", 0, "--out", "run")
    with pytest.raises(TrainError, match="has all of its 10 steps"):
        start("b", 1, "--resume", "--out", "run")


def test_resume_of_an_earlier_checkpoint_does_not_come_back_to_the_later_ones(options, start, tmp_path):
    assert main([*options, "--out", "run"]) == 0
    first, last = checkpoint.all_of(tmp_path / "run")
    for attempt in range(2):  # none was written since
        assert start("a", attempt, "--resume", str(first), "--steps", "12").resume == str(first)
    fit(start("a", 2, "--resume", str(first), "--steps", "12", "--lr", "2e-3", "--keep", "1", "--save-every", "0"))
    assert not first.exists() and not last.exists()
    assert start("a", 3, "--resume", str(first), "--steps", "12").resume == str(checkpoint.latest(tmp_path / "run"))


def test_a_damaged_checkpoint_is_passed_over(start, tmp_path):
    fit(start("a", 0, "--out", "run"))
    first, last = checkpoint.all_of(tmp_path / "run")
    (last / "model.safetensors").write_bytes(b"")
    assert start("a", 1, "--out", "run").resume == str(first)


@pytest.mark.parametrize(
    ("file", "restarts_allowed"), [("", "2"), ("/error.json", "2"), ("/l/attempt_0/0/e.json", "0")]
)
def test_where_nothing_starts_ranks_anew(monkeypatch, file, restarts_allowed, tmp_path):
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", file)
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", restarts_allowed)
    assert restarts.launch() is None
    restarts.remember(str(tmp_path))
    assert restarts.earlier(str(tmp_path), None) is None and not list(tmp_path.iterdir())
