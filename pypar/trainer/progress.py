"""What rank 0 shows while it trains: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from typing import Any


class Progress:
    """shown=False prints nothing: the other ranks. log_every: steps between plain lines."""

    def __init__(self, first: int, steps: int, tokens_per_step: int, log_every: int, shown: bool):
        self._steps = steps
        self._tokens_per_step = tokens_per_step
        self._log_every = log_every
        self._shown = shown
        self._start = time.monotonic()
        self._first = first
        self._paused_s = 0.0
        self._bar: Any = None
        if shown and sys.stdout.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=steps, initial=first, unit="step", file=sys.stdout, dynamic_ncols=True, leave=True)

    def tokens_per_s(self, step: int) -> float:
        """Mean since the start, validations and checkpoints left out. step: number of steps done."""
        return (step - self._first) * self._tokens_per_step / max(1e-9, self._busy_s())

    def step(self, step: int, loss: float, lr: float) -> None:
        """step: number of steps done"""
        if self._bar is not None:
            self._bar.set_postfix_str(f"loss {loss:.4f}, {self.tokens_per_s(step):,.0f} tokens/s", refresh=False)
            self._bar.update(1)
        elif self._shown and (step % self._log_every == 0 or step == self._steps):
            left_s = (self._steps - step) * self._busy_s() / max(1, step - self._first)
            self.say(
                f"step {step:>{len(str(self._steps))}}/{self._steps}  loss {loss:.4f}  lr {lr:.2e}  "
                f"{self.tokens_per_s(step):,.0f} tokens/s  ETA {int(left_s) // 60}:{int(left_s) % 60:02d}"
            )

    def pause(self) -> Pause:
        """A `with` around work that is no training: its time does not count in tokens/s."""
        return Pause(self)

    def say(self, text: str) -> None:
        if self._bar is not None:
            self._bar.write(text, file=sys.stdout)
        elif self._shown:
            print(text, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _busy_s(self) -> float:
        return time.monotonic() - self._start - self._paused_s


class Pause:
    def __init__(self, progress: Progress):
        self._progress = progress
        self._start = 0.0

    def __enter__(self) -> None:
        self._start = time.monotonic()

    def __exit__(self, *_: object) -> None:
        self._progress._paused_s += time.monotonic() - self._start
