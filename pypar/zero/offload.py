"""Optimizer states in a memory-mapped file: what does not fit into memory, the system writes to disk."""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn

from pypar.zero.flat import FlatParameters

if TYPE_CHECKING:
    from pypar.zero.optimizer import ShardedOptimizer

ALIGN_BYTES = 64


class StateFile:
    """A file that grows by what is asked for, mapped into memory; `bytes` is its size.

    It has no name once it is open, so that it is gone with the process however that ends; keep=True leaves it.
    """

    def __init__(self, path: str, keep: bool):
        self.path, self.bytes = path, 0
        try:
            self._file = open(path, "x+b", buffering=0)  # noqa: SIM115
        except OSError as error:
            raise _named(error, f"cannot create {path}") from error
        if not keep:
            os.unlink(path)

    def take(self, numels: Sequence[int], dtype: torch.dtype) -> list[torch.Tensor]:
        """A flat tensor of zeros for each. Raises OSError where the disk has no room for all of them."""
        offsets, total = [], 0
        for numel in numels:
            offsets.append(total)
            total += -(-numel * dtype.itemsize // ALIGN_BYTES) * ALIGN_BYTES
        if not total:
            return [torch.zeros(0, dtype=dtype) for _ in numels]
        total = -(-total // mmap.ALLOCATIONGRANULARITY) * mmap.ALLOCATIONGRANULARITY
        try:
            os.posix_fallocate(self._file.fileno(), self.bytes, total)  # else a full disk is a SIGBUS, later
            mapped = mmap.mmap(self._file.fileno(), total, mmap.MAP_SHARED, offset=self.bytes)
        except OSError as error:
            raise _named(error, f"no room for {total} more bytes in {self.path}") from error
        self.bytes += total
        whole = torch.frombuffer(mapped, dtype=torch.uint8)
        return [
            whole[offset : offset + numel * dtype.itemsize].view(dtype)
            for offset, numel in zip(offsets, numels, strict=True)
        ]


def _named(error: OSError, what: str) -> OSError:
    return OSError(error.errno, f"pypar.Zero: offload: {what}: {error.strerror}")


class Offload:
    """Which of this rank's states lie in the file, and where.

    where   a folder, or a path to which the rank's number is added
    ratio   of the float32 master weights, and of the other states, the share that goes there: the largest tensors
            that fit into it; a tensor is in the file or is not

    Raises, on every rank: ValueError; OSError, with the path.
    """

    def __init__(self, where: str | os.PathLike[str], ratio: float, keep: bool, group: dist.ProcessGroup):
        if not 0 <= ratio <= 1:
            raise ValueError(f"pypar.Zero: offload_ratio={ratio}; it is a share, 0 to 1")
        self.ratio, self.group = ratio, group
        path = os.fspath(where)
        if os.path.isdir(path):
            path = os.path.join(path, f"pypar-zero-{os.getpid()}")
        path = f"{path}.{dist.get_rank()}"
        self.file: StateFile
        self.chosen: set[int] = set()  # ids of pieces
        self._places: dict[tuple[int, str], torch.Tensor] = {}  # of each state, by id of its piece
        self._placed: set[int] = set()  # addresses
        self._agree(lambda: setattr(self, "file", StateFile(path, keep)))

    def _agree(self, work: Callable[[], None]) -> None:
        error: OSError | None = None
        try:
            work()
        except OSError as caught:
            error = caught
        everyone: list[OSError | None] = [None] * dist.get_world_size(self.group)
        dist.all_gather_object(everyone, error, group=self.group)
        for rank, found in enumerate(everyone):
            if found is not None:
                raise error or OSError(found.errno, f"{found.strerror} (on rank {rank})")

    def take_masters(self, flats: Iterable[FlatParameters]) -> None:
        """Before the optimizer's pieces are made of them. Collective."""
        masters = [flat for flat in flats if flat.master is not flat.own]
        chosen = [masters[i] for i in _largest([flat.master.numel() for flat in masters], self.ratio)]

        def move() -> None:
            tensors = self.file.take([flat.master.numel() for flat in chosen], torch.float32)
            for flat, tensor in zip(chosen, tensors, strict=True):
                flat.master = tensor.copy_(flat.master)

        self._agree(move)

    def reserve(self, optimizer: ShardedOptimizer, names: Callable[[dict[str, Any]], Sequence[str]]) -> None:
        """Chooses among the pieces. names: the states that a group's will have, as far as that is known: their room is
        taken now. Collective."""
        pieces = [(piece, names(group)) for group in optimizer.param_groups for piece in group["params"]]
        chosen = [pieces[i] for i in _largest([piece.numel() for piece, _ in pieces], self.ratio)]
        self.chosen = {id(piece) for piece, _ in chosen}

        self._agree(lambda: self._take([(piece, name) for piece, states in chosen for name in states]))

    def _take(self, wanted: Sequence[tuple[nn.Parameter, str]]) -> None:
        for dtype in {piece.dtype for piece, _ in wanted}:
            keys = [(piece, name) for piece, name in wanted if piece.dtype == dtype]
            tensors = self.file.take([piece.numel() for piece, _ in keys], dtype)
            self._places |= {(id(piece), name): tensor for (piece, name), tensor in zip(keys, tensors, strict=True)}

    def _is_missing(self, piece: nn.Parameter, value: Any) -> bool:
        """Belongs into the file, and is not there."""
        is_state = isinstance(value, torch.Tensor) and value.shape == piece.shape and value.dtype == piece.dtype
        return is_state and id(piece) in self.chosen and value.data_ptr() not in self._placed

    def place(self, piece: nn.Parameter, name: str, value: torch.Tensor) -> torch.Tensor:
        """The state, in the file where that is its place."""
        if not self._is_missing(piece, value):
            return value
        if (id(piece), name) not in self._places:
            self._take([(piece, name)])
        tensor = self._places[id(piece), name]
        self._placed.add(tensor.data_ptr())
        return tensor.copy_(value)

    def fresh(self, piece: nn.Parameter, name: str) -> torch.Tensor:
        """A state of zeros."""
        if id(piece) not in self.chosen:
            return torch.zeros_like(piece)
        return self.place(piece, name, torch.zeros((), dtype=piece.dtype).expand(piece.shape))

    def adopt(self, optimizer: ShardedOptimizer) -> None:
        """Moves what has come into memory since."""
        states = [(p, optimizer.inner.state.get(p, {})) for group in optimizer.param_groups for p in group["params"]]
        coming = [(p, name) for p, state in states for name, value in state.items() if self._is_missing(p, value)]
        self._take([(p, name) for p, name in coming if (id(p), name) not in self._places])
        for piece, name in coming:
            state = optimizer.inner.state[piece]
            state[name] = self.place(piece, name, state[name])


def _largest(numels: Sequence[int], ratio: float) -> list[int]:
    """Indices of the largest ones whose sum is at most that share of the sum of all."""
    left, found = ratio * sum(numels), []
    for index in sorted(range(len(numels)), key=lambda i: -numels[i]):
        if numels[index] <= left:
            found.append(index)
            left -= numels[index]
    return sorted(found)
