"""How a run ends when it does not end well: one line, an exit code, and for the launcher a file of the rank."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pypar.trainer import checkpoint
from pypar.trainer.errors import Interrupted, TrainError, reason


def wants_debug() -> bool:
    return os.environ.get("PYPAR_DEBUG", "") not in ("", "0")


def describe(error: BaseException, debug: bool) -> tuple[str, int]:
    """(one line, exit code). In debug mode the traceback goes to stderr first."""
    if debug:
        traceback.print_exception(error)
    if isinstance(error, TrainError):
        return str(error), error.exit_code
    hint = "" if debug else " (PYPAR_DEBUG=1 shows the traceback)"
    return reason(error) + hint, 1


def say(message: str) -> None:
    """The error line. On a terminal a progress bar may have left the cursor in its line."""
    newline = "\n" if sys.stderr.isatty() else ""
    print(f"{newline}pypar train: error: {' '.join(message.split())}", file=sys.stderr, flush=True)


def interrupted(error: BaseException, out: str | None) -> int:
    """Says where the run can go on and returns the exit code: 128 + the signal's number."""
    number = error.signal_number if isinstance(error, Interrupted) else signal.SIGINT
    last = checkpoint.latest(Path(out)) if out else None
    where = f"go on with --resume {last}" if last else "no checkpoint was written yet"
    say(f"stopped by {signal.Signals(number).name}; {where}")
    return 128 + number


@contextmanager
def raise_on_signals() -> Iterator[None]:
    """In the block the first SIGINT, SIGTERM or SIGHUP raises Interrupted in the main thread; later ones do nothing."""
    names = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def handler(number: int, _frame: object) -> None:
        for name in names:
            signal.signal(name, signal.SIG_IGN)
        raise Interrupted(number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    # What is ignored, as SIGHUP under nohup, stays so.
    before = {name: signal.getsignal(name) for name in names if signal.getsignal(name) is not signal.SIG_IGN}
    try:
        for name in before:
            signal.signal(name, handler)
        yield
    finally:
        for name, old in before.items():
            signal.signal(name, old)


def write_error_file(message: str, exit_code: int, expected: bool) -> bool:
    """Where torch's elastic agent looks for a rank's error (TORCHELASTIC_ERROR_FILE), in its format.

    expected: a TrainError, which is the cause, where another rank may only have noticed that this one is gone.
    Returns False when there is no such file or it can't be written.
    """
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not path:
        return False
    info = {"py_callstack": message, "timestamp": str(int(time.time())), "expected": expected}
    content = {"message": {"message": message, "errorCode": exit_code, "extraInfo": info}}
    try:
        Path(path).write_text(json.dumps(content))
    except OSError:
        return False
    return True


def leave(exit_code: int) -> None:
    """Ends the process without waiting for peers that may hang in a collective, nor for writer threads."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)
