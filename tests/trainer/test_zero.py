"""--zero changes the loss curve by rounding only, and its checkpoints are those of the plain run."""

import dataclasses
import json

import pytest
import torch

from pypar.testing import run_ranks
from pypar.trainer import args, checkpoint
from pypar.trainer.loop import Trainer
from pypar.trainer.main import main
from pypar.trainer.prepare import Job, prepare
from pypar.trainer.progress import Progress
from pypar.trainer.rank import _sample
from pypar.trainer.ranks import Ranks
from pypar.trainer.state import load_file

from .helpers import BACKEND, curve, rows, run_train
from .test_tensor_parallel import LLAMA, Validations, assert_close, resumed, train

# (dp, tp, zero) by number of ranks
LAYOUTS = {
    BACKEND: {2: [(2, 1, 1), (2, 1, 2), (2, 1, 3)], 3: [(3, 1, 3)], 4: [(2, 2, 2), (2, 2, 3)]},
    "gloo": {2: [(2, 1, 3)], 4: [(2, 2, 1), (2, 2, 3)]},
}


@pytest.fixture
def llama_options(options, model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model.write_text(json.dumps(LLAMA))
    return [*options, "--eps", "1e-5", "--batch-size", "7", "--accumulate", "2", "--keep", "9", "--eval-batches", "1"]


def laid_out(job: dict, dp: int, tp: int, zero: int) -> Job:
    made = Job.from_json(job)
    return dataclasses.replace(made, config=dataclasses.replace(made.config, dp=dp, tp=tp, zero=zero))


def saved(trainer: Trainer) -> dict[str, torch.Tensor]:
    """What a checkpoint of now holds."""
    trainer.save()
    path = checkpoint.folder_of(trainer.run, trainer.step)
    return load_file(path / "model.safetensors") | load_file(path / "optimizer.safetensors")


def results(rank: int, world_size: int, jobs: list[dict], layouts: list[tuple[int, int, int]], straight: bool):
    """For each layout: losses and norms, validation losses, sample, saved tensors. straight: of 4 steps, saved after 2;
    else of the last 2, from that checkpoint."""
    out = []
    for job, (dp, tp, zero) in zip(jobs, layouts, strict=True):
        made = laid_out(job, dp, tp, zero)
        trainer = Trainer(made if straight else resumed(made), Ranks.current("cpu"))
        steps = train(trainer, 2)
        if straight:
            trainer.save()
            steps = train(trainer, 2)
        validations = Validations()
        trainer._evaluate(validations, Progress(0, 4, 1, 1, shown=False))
        sample = _sample(trainer)
        out.append((steps, validations.losses, sample, saved(trainer)))
    return out


def job_at(llama_options, name) -> dict:
    return prepare(args.parse([*llama_options, "--out", name])[0], None, False).to_json()


@pytest.mark.parametrize("backend", [BACKEND, "gloo"])
def test_stages_change_only_rounding_and_checkpoints_are_the_plain_ones(llama_options, backend):
    plain = job_at(llama_options, "plain")
    (wanted,) = run_ranks(results, 1, [plain], [(1, 1, 0)], True, backend=BACKEND)[0]
    assert wanted[0][-1][0] < 5.6 and wanted[2]
    for world, layouts in LAYOUTS[backend].items():
        jobs = [job_at(llama_options, f"{backend}-{world}-{n}") for n in range(len(layouts))]
        straight = run_ranks(results, world, jobs, layouts, True, backend=backend)[0]
        again = run_ranks(results, world, jobs, layouts, False, backend=backend)[0]
        for found, other in zip(straight, again, strict=True):
            assert_close(found, wanted)
            assert found[:3] == other[:3], "a checkpoint goes on bit for bit"
            assert all(torch.equal(tensor, other[3][name]) for name, tensor in found[3].items())
        for layout in layouts:  # from the plain run's checkpoint, and back
            (found,) = run_ranks(results, world, [plain], [layout], False, backend=backend)[0]
            assert_close(found, wanted)
        (found,) = run_ranks(results, 1, jobs[-1:], [(1, 1, 0)], False, backend=BACKEND)[0]
        assert_close(found, wanted)


def test_a_stage_that_does_not_exist(refused, options):
    assert "--zero must be 1, 2 or 3, or 0 for none, got 4" in refused(*options, "--dp", "2", "--zero", "4")


@pytest.mark.slow
def test_the_command_line(llama_options, tmp_path):
    """Two ranks at stage 3; then the run goes on with three, at stage 1; then with one, plain."""
    done = run_train(*llama_options, "--dp", "2", "--zero", "3", "--out", "run", cwd=tmp_path)
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert "2 ranks (dp 2 x tp 1, ZeRO 3) over" in done.stdout
    assert main([*llama_options, "--out", "one"]) == 0
    one, two = ([(r["split"], r["step"], r["loss"]) for r in curve(tmp_path / name)] for name in ("one", "run"))
    assert [row[:2] for row in one] == [row[:2] for row in two]
    assert [row[2] for row in two] == pytest.approx([row[2] for row in one], rel=1e-5)
    done = run_train("--resume", "run", "--dp", "3", "--zero", "1", "--steps", "11", cwd=tmp_path)
    assert done.returncode == 0 and "3 ranks (dp 3 x tp 1, ZeRO 1) over" in done.stdout, done.stderr
    assert main(["--resume", "run", "--dp", "1", "--steps", "12"]) == 0
    assert rows(tmp_path / "run")[-1]["step"] == 12
