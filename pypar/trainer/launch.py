"""Starts local ranks through torch's elastic launcher, and turns what it reports into one error."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pypar.trainer.errors import Interrupted, TrainError
from pypar.trainer.prepare import Job


def launch(job: Job) -> None:
    """Runs the job on job.config.world_size() local ranks and waits for them.

    Raises TrainError with the first cause when a rank fails; Interrupted, when every rank is gone, after a signal.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    if not job.debug:
        # The agent logs signals and failed ranks as warnings and errors; the one line says it all.
        logging.disable(logging.ERROR)
    os.environ.setdefault("OMP_NUM_THREADS", str(job.config.threads or 1))
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "INFO" if job.debug else "ERROR")
    with tempfile.TemporaryDirectory(prefix="pypar_train_") as folder:
        path = Path(folder) / "job.json"
        path.write_text(json.dumps(job.to_json()))
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=job.config.world_size(),
            run_id=uuid.uuid4().hex,
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            local_addr="localhost",
            max_restarts=0,
            # SIGINT, SIGTERM and SIGHUP are ours.
            signals_to_handle="SIGQUIT",
            shutdown_timeout=10,
            logs_specs=DefaultLogsSpecs(log_dir=folder),
        )
        try:
            with _signals() as received:
                elastic_launch(config, sys.executable)("-m", "pypar.trainer.worker", str(path))
        except SignalException as error:
            raise Interrupted(received[0] if received else signal.SIGTERM) from error
        except ChildFailedError as error:
            raise _cause(error.failures) from error
        finally:
            logging.disable(logging.NOTSET)


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Signals in the block end the ranks with SIGTERM, whose default action is quick and silent. Yields what came."""
    from torch.distributed.elastic.multiprocessing import SignalException

    names = [
        name for name in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) if signal.getsignal(name) != signal.SIG_IGN
    ]
    received: list[int] = []

    def handler(number: int, _frame: object) -> None:
        received.append(number)
        raise SignalException(f"signal {number}", signal.SIGTERM)

    before = {name: signal.signal(name, handler) for name in names}
    try:
        yield received
    finally:
        for name in names:
            signal.signal(name, signal.SIG_IGN if received else before[name])


def _cause(failures: dict[int, Any]) -> TrainError:
    """Best first: an error that a rank explains, a rank that was killed, a rank that lost its peers."""

    def order(rank: int) -> tuple[int, int, int]:
        failure = failures[rank]
        info = failure.message.get("extraInfo", {}) if isinstance(failure.message, dict) else {}
        # SIGTERM is also how the agent ends the others, and its clock counts whole seconds.
        killed = failure.exitcode < 0 and failure.exitcode != -signal.SIGTERM
        kind = 0 if info.get("expected") else 1 if killed else 2
        return kind, failure.timestamp, rank

    rank = min(failures, key=order)
    failure = failures[rank]
    if isinstance(failure.message, dict):
        return TrainError(failure.message["message"], failure.message.get("errorCode", 1))
    if failure.exitcode < 0:
        return TrainError(
            f"rank {rank} was killed by {failure.signal_name()} (out of memory?): see the system's log, "
            "use a smaller --batch-size or more --accumulate, and go on with --resume",
            1,
        )
    return TrainError(f"rank {rank} ended with exit code {failure.exitcode} (PYPAR_DEBUG=1 shows more)", 1)
