"""The number of ranks and of accumulation steps changes the loss curve by rounding only."""

import dataclasses

import pytest
import torch

from pypar.testing import run_ranks
from pypar.trainer import args
from pypar.trainer.loop import Trainer
from pypar.trainer.prepare import Job, prepare
from pypar.trainer.progress import Progress
from pypar.trainer.ranks import Ranks

from .helpers import BACKEND


def losses_and_weights(rank: int, world_size: int, job: dict, accumulations: list[int]):
    """For each accumulation: ([loss of each of 4 steps], weights after them)."""
    out = []
    for accumulate in accumulations:
        job_now = Job.from_json(job)
        job_now = dataclasses.replace(
            job_now, config=dataclasses.replace(job_now.config, dp=world_size, accumulate=accumulate)
        )
        trainer = Trainer(job_now, Ranks.current("cpu"))
        losses = []
        for _ in range(4):
            losses.append(trainer._train_step(lr=1e-2)[0])
            trainer.position += job_now.config.batch_size
        trainer._evaluate(None, Progress(0, 4, 1, 1, shown=False))
        out.append((losses, {name: value.clone() for name, value in trainer.module.state_dict().items()}))
    return out


@pytest.mark.slow
def test_ranks_and_accumulation_change_only_rounding(options, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # Every rank draws its own dropout, so it is off here. eps: a gradient near zero must not become a step of lr.
    given = args.parse([*options, "--dropout", "0", "--eps", "1e-5", "--batch-size", "7"])[0]
    job = prepare(given, None, False).to_json()
    one = run_ranks(losses_and_weights, 1, job, [1, 3], backend=BACKEND)[0]
    # 7 sequences over 3 ranks: 3, 2, 2.
    three = run_ranks(losses_and_weights, 3, job, [1, 2], backend=BACKEND)
    reference_losses, reference = one[0]
    assert reference_losses[-1] < reference_losses[0]
    for losses, weights in [one[1], *[result for rank in three for result in rank]]:
        assert losses == pytest.approx(reference_losses, rel=1e-5)
        for name, expected in reference.items():
            torch.testing.assert_close(weights[name], expected, rtol=1e-4, atol=1e-5, msg=name)
    for step in range(2):
        for rank in three[1:]:
            assert rank[step][0] == three[0][step][0], "every rank sees the same loss"
            assert all(torch.equal(rank[step][1][name], value) for name, value in three[0][step][1].items())
