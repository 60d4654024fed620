"""Steps that succeed on all ranks or fail on all, with the reason of the rank that failed."""

from __future__ import annotations

import pickle
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

T = TypeVar("T")
U = TypeVar("U")
POLL_S = 0.02
ALIVE_S = 1.0  # between two signs of life
SILENCE_S = 120.0  # after which a rank counts as gone


class CheckpointError(RuntimeError):
    """A checkpoint can't be saved or loaded: raised on every rank, with the first reason and its rank."""


def reason(error: BaseException) -> str:
    """In one line."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror} ({error.filename})" if error.filename else error.strerror
    text = " ".join(str(error).split())
    return text if isinstance(error, CheckpointError) else f"{type(error).__name__}: {text}"


class Together:
    """All ranks of the job, by collective calls; a world of one where there is no process group."""

    def __init__(self, what: str) -> None:
        """what: begins each message, "cannot save x"."""
        self.what = what
        has_group = dist.is_initialized()
        self.rank = dist.get_rank() if has_group else 0
        self.world_size = dist.get_world_size() if has_group else 1

    def spread(self, local: Callable[[], T], combine: Callable[[list[T]], list[U]]) -> U:
        """combine(what local() gives on each rank) on rank 0; each rank gets its item. Raises CheckpointError."""
        mine = self._run(local)
        everyone = self._gather(mine)
        answers = None if everyone is None else self._combine(everyone, combine)
        return self._settled(self._scatter(answers))

    def all(self, local: Callable[[], T]) -> list[T]:
        """What local() gives on each rank, on every rank. Raises CheckpointError."""
        mine = self._run(local)
        everyone: list[Any] = [mine]
        if self.world_size > 1:
            everyone = [None] * self.world_size
            dist.all_gather_object(everyone, mine)
        self._settled((next((error for error, _ in everyone if error), None), None))
        return [value for _, value in everyone]

    def _run(self, local: Callable[[], T]) -> tuple[str | None, T | None]:
        self._cause: Exception | None = None
        try:
            return None, local()
        except Exception as error:
            self._cause = error
            where = f"rank {self.rank}: " if self.world_size > 1 else ""
            return where + reason(error), None

    def _combine(self, everyone: list[Any], combine: Callable[[list[T]], list[U]]) -> list[tuple[str | None, Any]]:
        error = next((error for error, _ in everyone if error), None)
        if error is None:
            error, found = self._run(lambda: combine([value for _, value in everyone]))
            if found is not None:
                return [(None, each) for each in found]
        return [(error, None)] * self.world_size

    def _settled(self, answer: tuple[str | None, Any]) -> Any:
        error, value = answer
        if error is not None:
            raise CheckpointError(f"{self.what}: {error}") from self._cause
        return value

    def _gather(self, mine: Any) -> list[Any] | None:
        if self.world_size == 1:
            return [mine]
        everyone: list[Any] | None = [None] * self.world_size if self.rank == 0 else None
        dist.gather_object(mine, everyone, dst=0)
        return everyone

    def _scatter(self, answers: list[Any] | None) -> Any:
        if self.world_size == 1:
            assert answers is not None
            return answers[0]
        mine: list[Any] = [None]
        dist.scatter_object_list(mine, answers, src=0)
        return mine[0]


class InBackground(Together):
    """The same from a thread beside the training, whose collective calls it must not cross: through the job's store.

    token: of this one use, the same on all ranks. A rank that shows no sign of life for SILENCE_S counts as gone.
    """

    def __init__(self, what: str, token: str) -> None:
        super().__init__(what)
        self._prefix = f"pypar/checkpoint/{token}"
        self._store = _get_default_store() if self.world_size > 1 else None

    def spread(self, local: Callable[[], T], combine: Callable[[list[T]], list[U]]) -> U:
        if self._store is None:
            return super().spread(local, combine)
        with self._alive():
            return super().spread(local, combine)

    def _gather(self, mine: Any) -> list[Any] | None:
        if self._store is None:
            return [mine]
        if self.rank:
            self._store.set(f"{self._prefix}/in/{self.rank}", pickle.dumps(mine))  # type: ignore[arg-type]
            return None
        others = [self._await(f"in/{rank}", rank) for rank in range(1, self.world_size)]
        return [mine, *others]

    def _scatter(self, answers: list[Any] | None) -> Any:
        if self._store is None:
            return super()._scatter(answers)
        if answers is None:
            return self._await(f"out/{self.rank}", 0)
        for rank in range(1, self.world_size):
            self._store.set(f"{self._prefix}/out/{rank}", pickle.dumps(answers[rank]))  # type: ignore[arg-type]
        return answers[0]

    def _await(self, key: str, rank: int) -> Any:
        """The answer of a rank, or an error in its place."""
        assert self._store is not None
        key, sign = f"{self._prefix}/{key}", f"{self._prefix}/alive/{rank}"
        seen, since = b"", time.monotonic()
        while not self._store.check([key]):
            now = self._store.get(sign) if self._store.check([sign]) else b""
            if now != seen:
                seen, since = now, time.monotonic()
            if time.monotonic() - since > SILENCE_S:
                return f"rank {rank} gave no sign of life for {SILENCE_S:.0f} s", None
            time.sleep(POLL_S)
        found = pickle.loads(self._store.get(key))
        self._store.delete_key(key)
        return found

    @contextmanager
    def _alive(self) -> Iterator[None]:
        """Meanwhile another thread says that this rank is there: this one may be held up by a disk."""
        over = threading.Event()

        def signs() -> None:
            count = 0
            while not over.wait(ALIVE_S):
                count += 1
                assert self._store is not None
                self._store.set(f"{self._prefix}/alive/{self.rank}", str(count))

        thread = threading.Thread(target=signs, name="pypar-checkpoint-alive", daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()
