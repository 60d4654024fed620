"""The curve of a run: metrics.jsonl, one object per line, and TensorBoard files beside it. Only rank 0 writes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pypar.atomic import write_file
from pypar.trainer.errors import TrainError, reason

NAME = "metrics.jsonl"
_ON_BOARD = ("loss", "lr", "grad_norm", "tokens_per_s")


@contextmanager
def writing(run: Path) -> Iterator[None]:
    """Turns an OSError of the block, such as a full disk, into a TrainError."""
    try:
        yield
    except OSError as error:
        raise TrainError(f"cannot write to {run}: {reason(error)}: free space, then --resume", 1) from error


class Metrics:
    """Appends rows to RUN/metrics.jsonl and RUN/tensorboard. Raises TrainError when the disk is full."""

    def __init__(self, run: Path, step: int, before: list[dict[str, Any]]):
        """step: of the checkpoint that is resumed, or 0. before: the rows up to it; the file starts with them."""
        from torch.utils.tensorboard import SummaryWriter

        self.rows = before
        self._run = run
        path = run / NAME
        with writing(run):
            write_file(path, "".join(json.dumps(row) + "\n" for row in before).encode())
            self._file = open(path, "ab", buffering=0)  # noqa: SIM115
            self._board: Any = SummaryWriter(run / "tensorboard", purge_step=step + 1 if step else None)

    def add(self, split: str, step: int, **values: float) -> None:
        """split: "train" or "val". Losses are nats per token."""
        row: dict[str, Any] = {"split": split, "step": step, **values}
        self.rows.append(row)
        with writing(self._run):
            self._file.write(json.dumps(row).encode() + b"\n")
            for name in _ON_BOARD:
                if name in values:
                    self._board.add_scalar(f"{split}/{name}", values[name], step)

    def close(self) -> None:
        self._file.close()
        self._board.close()


def read(run: Path | None, last_step: int) -> list[dict[str, Any]]:
    """The rows up to and with last_step; a last line that was cut off is left out."""
    rows: list[dict[str, Any]] = []
    path = run / NAME if run else None
    if path is None or not path.is_file():
        return rows
    for line in path.read_text().splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if row["step"] <= last_step:
            rows.append(row)
    return rows


def curve(rows: list[dict[str, Any]], split: str) -> tuple[list[int], list[float]]:
    """(steps, losses) of one split"""
    chosen = [row for row in rows if row["split"] == split]
    return [row["step"] for row in chosen], [row["loss"] for row in chosen]
