"""pypar train with every flag together: the curve changes by rounding only, a checkpoint goes on under another plan."""

import dataclasses

import pytest

from pypar.testing import run_ranks
from pypar.trainer import args
from pypar.trainer.loop import Trainer
from pypar.trainer.prepare import Job, prepare
from pypar.trainer.progress import Progress
from pypar.trainer.rank import _sample
from pypar.trainer.ranks import Ranks

from .helpers import BACKEND, curve, run_train
from .test_pipeline import assert_near, job_at, llama_options  # noqa: F401
from .test_tensor_parallel import Validations, resumed, train
from .test_zero import saved

PLANS = (
    "pp=2 tp=2 schedule=zbh1 micro_batches=3 sequence_parallel=true",
    "pp=2 dp=2 zero=3 schedule=zbv micro_batches=2 split=balanced",
    "dp=2 tp=2 zero=1 recompute=true order=tp+dp+pp",
    "dp=4 zero=2 replicate=2",
)


def results(rank: int, world_size: int, jobs: list[dict], plans: tuple[str, ...]):
    """Two steps, a checkpoint, two more; from the checkpoint of the plan before, again two."""
    out = []
    for number, plan in enumerate(plans):
        given = args._fields(plan)
        made = Job.from_json(jobs[number])
        made = dataclasses.replace(made, config=dataclasses.replace(made.config, **given))
        trainer = Trainer(made, Ranks.current("cpu"))
        train(trainer, 2)
        trainer.save()
        steps = train(trainer, 2)
        validations = Validations()
        trainer._evaluate(validations, Progress(0, 4, 1, 1, shown=False))
        sample = _sample(trainer)
        whole = saved(trainer) if rank == 0 else trainer.save()
        before = Job.from_json(jobs[number - 1]) if number else made
        its = dataclasses.replace(before, config=dataclasses.replace(made.config, out=before.config.out))
        again = Trainer(resumed(its), Ranks.current("cpu"))
        out.append(((steps, validations.losses, sample, whole), train(again, 2)))
    return out


def test_plans_change_only_rounding_and_go_on_from_each_other(llama_options):  # noqa: F811
    plain = job_at(llama_options, "plain")
    (wanted,) = run_ranks(results, 1, [plain], ("dp=1",), backend=BACKEND)[0]
    jobs = [job_at(llama_options, f"plan-{n}") for n in range(len(PLANS))]
    for plan, (found, again) in zip(PLANS, run_ranks(results, 4, jobs, PLANS, backend=BACKEND)[0], strict=True):
        assert_near(found, wanted[0])
        assert found[2] == wanted[0][2], plan
        for (loss, norm), (its_loss, its_norm) in zip(again, wanted[0][0], strict=True):
            assert loss == pytest.approx(its_loss, rel=1e-4) and norm == pytest.approx(its_norm, rel=1e-3), plan


@pytest.mark.slow
def test_the_command_line(llama_options, tmp_path):  # noqa: F811
    plan = "pp=2 dp=2 zero=1 micro_batches=2"
    done = run_train(*llama_options, "--plan", plan, "--steps", "4", "--out", "run", cwd=tmp_path)
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert "4 ranks (pp 2 (1f1b), dp 2 x tp 1, ZeRO 1)" in done.stdout and "--- sample" in done.stdout
    more = run_train("--resume", "--out", "run", "--plan", "dp=2 tp=2 zero=3", "--steps", "6", cwd=tmp_path)
    assert more.returncode == 0 and "4 ranks (dp 2 x tp 2, ZeRO 3)" in more.stdout, more.stderr
    assert [row["step"] for row in curve(tmp_path / "run") if row["split"] == "train"] == [1, 2, 3, 4, 5, 6]


def test_prepare_knows_what_torchrun_gives(llama_options):  # noqa: F811
    given = args.parse([*llama_options, "--pp", "2", "--out", "ranks"])[0]
    assert prepare(given, None, False, 8).config.dp == 4
