"""One rank that launch.py started: `python -m pypar.trainer.worker JOB.json`."""

from __future__ import annotations

import ctypes
import json
import signal
import sys
from pathlib import Path

# Before the slow imports: the launcher alone hears Ctrl-C, and ends the ranks with SIGTERM.
signal.signal(signal.SIGINT, signal.SIG_IGN)


def _die_with_parent() -> None:
    """PR_SET_PDEATHSIG: a rank does not outlive a launcher that was killed."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)


def main() -> None:
    _die_with_parent()
    from pypar.trainer import report
    from pypar.trainer.errors import TrainError

    debug = report.wants_debug()
    try:
        from pypar.trainer.prepare import Job
        from pypar.trainer.rank import join, train

        job = Job.from_json(json.loads(Path(sys.argv[1]).read_text()))
        debug = debug or job.debug
        train(job, join(job.config.backend, job.config.device))
    except Exception as error:
        message, code = report.describe(error, debug)
        if not report.write_error_file(message, code, isinstance(error, TrainError)):
            report.say(message)
        report.leave(code)
    import torch.distributed as dist

    dist.destroy_process_group()
    report.leave(0)


if __name__ == "__main__":
    main()
