"""Which tokens a step trains on. Everything here depends on the data and the seed, never on the number of ranks."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch

from pypar.trainer.cache import TokenCache
from pypar.trainer.errors import TrainError


class Stream:
    """Pieces of a token array read as one sequence, cut into sequences of seq_len inputs and as many targets.

    Sequence i holds tokens [i * seq_len, (i + 1) * seq_len] of the stream: seq_len + 1 of them, targets shifted by one.
    """

    def __init__(self, tokens: np.ndarray, starts: np.ndarray, lengths: np.ndarray, seq_len: int):
        self.seq_len = seq_len
        self._tokens = tokens
        self._starts = starts
        self._ends = np.cumsum(lengths)
        self.num_tokens = int(self._ends[-1]) if len(lengths) else 0
        self.num_sequences = max(0, (self.num_tokens - 1) // seq_len)

    def sequence(self, index: int) -> np.ndarray:
        """int64 [seq_len + 1]"""
        low = index * self.seq_len
        parts = []
        missing = self.seq_len + 1
        piece = int(np.searchsorted(self._ends, low, side="right"))
        while missing:
            offset = low - (int(self._ends[piece - 1]) if piece else 0)
            available = int(self._ends[piece]) - low
            take = min(available, missing)
            begin = int(self._starts[piece]) + offset
            parts.append(self._tokens[begin : begin + take])
            low, missing, piece = low + take, missing - take, piece + 1
        return np.concatenate(parts).astype(np.int64)


def split(cache: TokenCache, seq_len: int, val_fraction: float, seed: int) -> tuple[Stream, Stream]:
    """(train, validation) by whole documents, shuffled by seed; both hold at least one sequence.

    Where no document is small enough to be held out, the end of the largest one is.
    Raises TrainError when the data is too short.
    """
    total = len(cache.tokens)
    need = seq_len + 1
    if total < 2 * need:
        raise TrainError(
            f"the data has {total} tokens, too few for one training and one validation sequence of --seq-len {seq_len} "
            f"({2 * need} tokens): give more --data, or " + _shorter(total)
        )
    starts = np.concatenate([[0], cache.ends[:-1]]).astype(np.int64)
    lengths = cache.ends - starts
    order = np.array(sorted(range(len(starts)), key=lambda index: _rank_of(seed, index)), dtype=np.int64)
    target = max(need, round(val_fraction * total))
    held: list[int] = []
    tokens = 0
    for document in order:
        length = int(lengths[document])
        if tokens < target and tokens + length <= max(2 * target, need) and total - tokens - length >= need:
            held.append(int(document))
            tokens += length
    if tokens < need:
        return _cut_largest(cache, starts, lengths, order, target, seq_len)
    val = np.array(held, dtype=np.int64)
    train = order[~np.isin(order, val)]
    return (
        Stream(cache.tokens, starts[train], lengths[train], seq_len),
        Stream(cache.tokens, starts[val], lengths[val], seq_len),
    )


def _cut_largest(
    cache: TokenCache, starts: np.ndarray, lengths: np.ndarray, order: np.ndarray, target: int, seq_len: int
) -> tuple[Stream, Stream]:
    largest = int(np.argmax(lengths))
    held = min(target, len(cache.tokens) - (seq_len + 1))
    if lengths[largest] < held:
        raise TrainError(
            f"no document of the data is as long as --seq-len {seq_len}, and no set of them can be held out: "
            "give more --data, or a shorter --seq-len"
        )
    rest = lengths.copy()
    rest[largest] -= held
    val_start = np.array([starts[largest] + rest[largest]], dtype=np.int64)
    return (
        Stream(cache.tokens, starts[order], rest[order], seq_len),
        Stream(cache.tokens, val_start, np.array([held], dtype=np.int64), seq_len),
    )


def _rank_of(seed: int, index: int) -> bytes:
    return hashlib.blake2b(f"{seed} {index}".encode(), digest_size=16).digest()


def _shorter(total: int) -> str:
    longest = total // 2 - 1
    return f"--seq-len {longest} or less" if longest >= 1 else "text that is longer than a few bytes"


class Order:
    """The endless order of training sequences: every epoch a new permutation, drawn from (seed, epoch)."""

    def __init__(self, num_sequences: int, seed: int):
        self.num_sequences = num_sequences
        self._seed = seed
        self._epoch = -1
        self._permutation = np.empty(0, dtype=np.int64)

    def take(self, position: int, count: int) -> list[int]:
        """The sequences at `position` .. `position + count`, counted from the start of the run."""
        return [self._at(place) for place in range(position, position + count)]

    def _at(self, place: int) -> int:
        epoch, offset = divmod(place, self.num_sequences)
        if epoch != self._epoch:
            self._permutation = permutation(self.num_sequences, self._seed, epoch)
            self._epoch = epoch
        return int(self._permutation[offset])


def permutation(size: int, seed: int, epoch: int) -> np.ndarray:
    """int64 [size]; Philox, keyed by (seed, epoch)"""
    return np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(size)


def share(indices: Sequence[int], rank: int, world_size: int) -> list[int]:
    """This rank's part of a global batch; the first ranks hold one sequence more when it does not divide."""
    return [int(index) for index in np.array_split(np.asarray(indices, dtype=np.int64), world_size)[rank]]


def batch(stream: Stream, indices: Sequence[int], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """(inputs, targets), int64 [len(indices), seq_len] each"""
    rows = torch.from_numpy(np.stack([stream.sequence(index) for index in indices])).to(device)
    return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()
