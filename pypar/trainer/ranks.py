"""This process among the ranks of the job, and how they agree on results and on errors."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from pypar.trainer.errors import TrainError, reason


def under_torchrun() -> bool:
    """True when a launcher such as torchrun started this process."""
    return all(name in os.environ for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))


@dataclass(frozen=True)
class Ranks:
    """rank and world_size of the job; local ones of this host; the device this rank computes on."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    device: torch.device

    @classmethod
    def current(cls, device: str) -> Ranks:
        """After pypar.init(). device: auto, cpu or cuda."""
        local_rank = int(os.environ.get("LOCAL_RANK", 0))
        return cls(
            dist.get_rank(),
            dist.get_world_size(),
            local_rank,
            int(os.environ.get("LOCAL_WORLD_SIZE", dist.get_world_size())),
            pick_device(device, local_rank),
        )

    def first(self, fn: Callable[[], Any]) -> Any:
        """fn() on rank 0; its result, or its error as a TrainError, on every rank."""
        outcome: list[Any] = [None]
        cause: Exception | None = None
        if self.rank == 0:
            try:
                outcome = [{"value": fn()}]
            except Exception as error:
                cause = error
                outcome = [{"error": _text(error), "exit_code": getattr(error, "exit_code", 1)}]
        dist.broadcast_object_list(outcome, src=0)
        if "error" in outcome[0]:
            raise TrainError(outcome[0]["error"], outcome[0]["exit_code"], echo=self.rank != 0) from cause
        return outcome[0]["value"]

    def agree(self, fn: Callable[[], Any]) -> Any:
        """fn() on every rank; an error on any of them is raised on all. Returns this rank's own result."""
        error: Exception | None = None
        value = None
        try:
            value = fn()
        except Exception as caught:
            error = caught
        errors = self.gather(None if error is None else [_text(error), getattr(error, "exit_code", 1)])
        for rank, found in enumerate(errors):
            if found is not None:
                raise TrainError(found[0], found[1], echo=self.rank != rank) from error
        return value

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, by rank, on every rank."""
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def total(self, *values: float | torch.Tensor) -> list[float]:
        """The sums over ranks, in float64 and rounded once: the same bits on every rank."""
        sums = torch.stack([torch.as_tensor(value, dtype=torch.float64, device=self.device) for value in values])
        if self.world_size > 1:
            dist.all_reduce(sums)
        return sums.tolist()


def pick_device(device: str, local_rank: int) -> torch.device:
    """auto: CUDA when there is any. Raises TrainError when this rank has no GPU of its own."""
    if device == "cpu" or (device == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if local_rank >= torch.cuda.device_count():
        raise TrainError(
            f"local rank {local_rank} has no GPU of its own ({torch.cuda.device_count()} here): use --device cpu"
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def _text(error: Exception) -> str:
    return str(error) if isinstance(error, TrainError) else reason(error)
