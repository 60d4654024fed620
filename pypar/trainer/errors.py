"""What a user of `pypar train` can get wrong, or what the machine refuses: one line that says what to do."""

from __future__ import annotations


class TrainError(Exception):
    """Shown as `pypar train: error: <message>`, without a traceback.

    exit_code: 2 for wrong input, 1 for what goes wrong on the way.
    echo: True where another rank reports the same error.
    """

    def __init__(self, message: str, exit_code: int = 2, echo: bool = False):
        super().__init__(message)
        self.exit_code = exit_code
        self.echo = echo


class Interrupted(BaseException):
    """A signal asked the run to end. Not an Exception: nothing on the way may swallow it."""

    def __init__(self, signal_number: int):
        super().__init__(signal_number)
        self.signal_number = signal_number


def reason(error: BaseException, with_type: bool = True) -> str:
    """The error as one line: `No space left on device`, `ValueError: ...`, or without the type."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror} ({error.filename})" if error.filename else error.strerror
    text = " ".join(str(error).split())
    if text and not with_type:
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
