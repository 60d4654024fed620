"""In which order units are used, learnt from the pass before. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Generic, TypeVar

T = TypeVar("T")


class Order(Generic[T]):
    """What the last pass used, followed by this one. A pass that goes another way is followed from where it comes back;
    what is next is a guess, the same on every rank as long as the ranks do the same."""

    def __init__(self) -> None:
        self.last: list[T] = []
        self.now: list[T] = []
        self._at = 0

    def begin(self, guess: Sequence[T] | None = None) -> None:
        """A new pass. guess: what it may use, where that is known better than from the last one."""
        if guess is not None:
            self.last = list(guess)
        elif self.now:
            self.last = self.now
        self.now, self._at = [], 0

    def follow(self, used: T) -> None:
        self.now.append(used)
        for at in range(self._at, len(self.last)):
            if self.last[at] is used:
                self._at = at + 1
                return

    @property
    def next(self) -> T | None:
        """None: the pass is at its end, or there was none before."""
        return self.last[self._at] if self._at < len(self.last) else None
