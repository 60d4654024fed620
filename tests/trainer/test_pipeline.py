"""--pp changes the loss curve by rounding only; its checkpoints are those of a plain run, and go on under it."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from pypar.testing import run_ranks
from pypar.trainer import args
from pypar.trainer.loop import Trainer
from pypar.trainer.main import main
from pypar.trainer.prepare import Job, prepare
from pypar.trainer.progress import Progress
from pypar.trainer.rank import _sample
from pypar.trainer.ranks import Ranks

from .helpers import BACKEND, curve, run_train
from .test_tensor_parallel import LLAMA, Validations, resumed, train
from .test_zero import saved

SCHEDULES = ("1f1b", "zbv")


@pytest.fixture
def llama_options(options, model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model.write_text(json.dumps(LLAMA | {"num_hidden_layers": 4}))
    return [
        *options,
        "--eps",
        "1e-5",
        "--batch-size",
        "7",
        "--micro-batches",
        "3",
        "--keep",
        "9",
        "--eval-batches",
        "1",
    ]


def results(rank: int, world_size: int, jobs: list[dict], schedules: tuple[str, ...], straight: bool):
    """As test_zero's: losses and norms, validation losses, sample, saved tensors, of each schedule."""
    out = []
    for job, schedule in zip(jobs, schedules, strict=True):
        made = Job.from_json(job)
        config = dataclasses.replace(made.config, pp=world_size, schedule=schedule)
        made = dataclasses.replace(made, config=config)
        trainer = Trainer(made if straight else resumed(made), Ranks.current("cpu"))
        steps = train(trainer, 2)
        if straight:
            trainer.save()
            steps = train(trainer, 2)
        validations = Validations()
        trainer._evaluate(validations, Progress(0, 4, 1, 1, shown=False))
        out.append((steps, validations.losses, _sample(trainer), saved(trainer) if rank == 0 else trainer.save()))
    return out


def assert_near(found, wanted):
    """Norms after three steps of lr 1e-2 differ by rounding that the steps have made larger."""
    for (loss, norm), (its_loss, its_norm) in zip(found[0], wanted[0], strict=True):
        assert loss == pytest.approx(its_loss, rel=1e-5) and norm == pytest.approx(its_norm, rel=1e-4)
    assert found[1] == pytest.approx(wanted[1], rel=1e-5)
    assert found[3].keys() == wanted[3].keys()
    for name, expected in wanted[3].items():
        torch.testing.assert_close(found[3][name], expected, rtol=1e-4, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")


def job_at(llama_options, name) -> dict:
    return prepare(args.parse([*llama_options, "--out", name])[0], None, False).to_json()


def test_a_pipeline_changes_only_rounding_and_its_checkpoints_are_the_plain_ones(llama_options):
    plain = job_at(llama_options, "plain")
    (wanted,) = run_ranks(results, 1, [plain], ("1f1b",), True, backend=BACKEND)[0]
    jobs = [job_at(llama_options, f"pp-{n}") for n in range(len(SCHEDULES))]
    by_rank = run_ranks(results, 2, jobs, SCHEDULES, True, backend=BACKEND)
    again = run_ranks(results, 2, jobs, SCHEDULES, False, backend=BACKEND)[0]
    for found, other, theirs in zip(by_rank[0], again, by_rank[1], strict=True):
        assert found[0] == theirs[0] and found[1] == theirs[1] and found[2] == theirs[2]
        assert found[2]  # the sample's numbers are drawn by another generator than the plain run's
        assert_near(found, wanted)
        assert other[:2] == found[:2], "a checkpoint goes on bit for bit"
        assert all(torch.equal(tensor, other[3][name]) for name, tensor in found[3].items())
    (found,) = run_ranks(results, 1, jobs[-1:], ("1f1b",), False, backend=BACKEND)[0]  # plain, from a pipeline's
    assert_near(found, wanted)


@pytest.mark.slow
def test_the_command_line(llama_options):
    run = run_train(*llama_options, "--pp", "2", "--schedule", "zbh1", "--steps", "4", "--out", "run", cwd=".")
    assert run.returncode == 0, run.stderr
    assert "2 ranks (pp 2 (zbh1))" in run.stdout and "--- sample" in run.stdout
    more = run_train("--resume", "--out", "run", "--steps", "6", "--pp", "1", cwd=".")
    assert more.returncode == 0, more.stderr
    assert [row["step"] for row in curve(Path("run")) if row["split"] == "train"] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(
    ("given", "error"),
    [
        (["--pp", "2", "--schedule", "zbx"], "--schedule zbx: there are gpipe"),
        (["--pp", "5"], "5 stages for 4 blocks"),
        (["--plan", "pp=2 num_stages=8 schedule=interleaved"], "--schedule interleaved, --model"),
        (["--plan", "pp=2 num_stages=4 schedule=interleaved", "--schedule", "1f1b"], "use --plan without num_stages"),
        (["--pp", "2", "--micro-batches", "0"], "--micro-batches must be at least 1"),
    ],
)
def test_wrong_options(llama_options, capsys, given, error):
    assert main([*llama_options, *given]) == 2
    assert error in capsys.readouterr().err
