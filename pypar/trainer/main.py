"""`pypar train`: one process, local ranks, or a rank of torchrun."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pypar.trainer import args, report
from pypar.trainer.errors import Interrupted, TrainError

if TYPE_CHECKING:
    from pypar.trainer.prepare import Job
    from pypar.trainer.ranks import Ranks


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0, 2 for wrong input, 1 for what failed on the way, or 128 + signal. argv: without `train`."""
    from pypar.trainer.ranks import under_torchrun

    debug = report.wants_debug()
    out: list[str] = []
    try:
        given, resume, debug_given = args.parse(sys.argv[1:] if argv is None else argv)
        debug = debug or debug_given
        if under_torchrun():
            # torchrun passes Ctrl-C on to every rank and reports it: each ends at once and says nothing.
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            _as_rank(given, resume, debug)
        else:
            with report.raise_on_signals():
                _here(given, resume, debug, out)
        return 0
    except (Interrupted, KeyboardInterrupt) as error:
        return report.interrupted(error, out[0] if out else None)
    except Exception as error:
        message, code = report.describe(error, debug)
        if not (isinstance(error, TrainError) and error.echo):
            report.say(message)
        if under_torchrun():
            report.write_error_file(message, code, isinstance(error, TrainError))
            report.leave(code)
        return code


def _here(given: dict[str, Any], resume: str | None, debug: bool, out: list[str]) -> None:
    """Prepares in this process, then trains in it or in ranks that it starts. out: gets the run's folder."""
    from pypar.trainer.prepare import prepare

    job = prepare(given, resume, debug)
    out.append(str(job.config.out))
    if job.config.world_size() > 1:
        from pypar.trainer.launch import launch

        launch(job)
    else:
        _train(job.config.backend, job.config.device, lambda ranks: job)


def _as_rank(given: dict[str, Any], resume: str | None, debug: bool) -> None:
    """torchrun started this process: rank 0 prepares for all; each further host builds its own token cache."""
    from pypar.trainer import cache, restarts
    from pypar.trainer.prepare import Job, prepare
    from pypar.trainer.tokens import load_tokens

    def agree_on_job(ranks: Ranks) -> Job:
        def first() -> dict[str, Any]:
            again = restarts.earlier(given.get("out"), resume)
            job = prepare(given, resume, debug, ranks.world_size, again)
            if again is None:
                restarts.remember(str(job.config.out))
            return job.to_json()

        job = Job.from_json(ranks.first(first))

        def build() -> None:
            if ranks.local_rank == 0 and ranks.rank != 0 and not Path(job.cache).exists():
                built = cache.build(job.config.data, load_tokens(job.config.tokenizer), Path(job.cache).parent)
                if str(built) != job.cache:
                    raise TrainError(
                        "--data is not the same on every host: copy it with its times, or share a file system"
                    )

        ranks.agree(build)
        return job

    _train(given.get("backend"), given.get("device", "auto"), agree_on_job)


def _train(backend: str | None, device: str, agree_on_job: Callable[[Ranks], Job]) -> None:
    """Joins the job, agrees on what it is, trains."""
    import torch.distributed as dist

    from pypar.trainer.rank import join, train

    started = not dist.is_initialized()
    try:
        ranks = join(backend, device)
        train(agree_on_job(ranks), ranks)
    finally:
        # With peers, a failed rank leaves at once: they may hang in a collective.
        failed = sys.exc_info()[0] is not None
        if started and dist.is_initialized() and (not failed or dist.get_world_size() == 1):
            dist.destroy_process_group()
