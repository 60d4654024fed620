"""Bytes that one rank of an op has to move, whoever implements it, and what a kernel of ours was seen to move.

Locally: every input is read once and every result written once. What a rank learns of the others must be sent by one
of them, in the dtype in which the op rounds it. Nothing else is counted: no slot, which a peer could spare by storing
where the result is wanted; no second reading of a matmul's operands, which caches could spare; no flags.

Sizes are of one rank, the mean over ranks where they differ; `item`: bytes of an element, `W`: ranks.
"""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Least:
    read: float
    written: float
    to_peers: float


@dataclasses.dataclass(frozen=True)
class Moved:
    """Counted while the kernels ran, the mean over ranks."""

    language: str
    kernel: str
    shape: str
    dtype: str
    read: float
    written: float
    to_peers: float
    from_peers: float
    least: Least

    @property
    def local_ratio(self) -> float:
        return (self.read + self.written) / (self.least.read + self.least.written)

    @property
    def peers_ratio(self) -> float:
        """Where nothing must be sent: 1 if nothing was."""
        if not self.least.to_peers:
            return 1.0 if not self.to_peers else float("inf")
        return self.to_peers / self.least.to_peers


def all_reduce(numel: int, item: int, W: int) -> Least:
    """Of each element, W numbers become one that W ranks know: W - 1 sends to bring them together, W - 1 to tell."""
    return Least(numel * item, numel * item, 2 * (W - 1) / W * numel * item)


def reduce_scatter(numel: int, item: int, W: int) -> Least:
    """Each owner must hear of the W - 1 others, or of who has summed theirs: W - 1 sends for each of numel elements."""
    return Least(numel * item, numel / W * item, (W - 1) / W * numel * item)


def all_gather(numel: int, item: int, W: int) -> Least:
    """numel: of all shards. Each of them must reach W - 1 ranks."""
    return Least(numel / W * item, numel * item, (W - 1) / W * numel * item)


def gather_in_place(numel: int, item: int, W: int) -> Least:
    """all_gather whose result is used where it arrives: a rank writes its own shard, the peers write the others."""
    return Least(numel / W * item, numel / W * item, (W - 1) / W * numel * item)


def zero_scatter(numel: int, item: int, W: int) -> Least:
    """reduce_scatter into a float32 shard that is added to: read and written."""
    sent = reduce_scatter(numel, item, W)
    return Least(sent.read + numel / W * 4, numel / W * 4, sent.to_peers)


def zero_step(numel: int, item: int, W: int) -> Least:
    """reduce_scatter of the gradient; param, both moments and their maximum, float32, read and written; the cast."""
    sent = reduce_scatter(numel, item, W)
    return Least(sent.read + numel / W * 16, numel / W * (16 + item), sent.to_peers)


def ring(numel: int, item: int, W: int) -> Least:
    """One message to one rank, used where it arrives."""
    return Least(numel * item, 0, numel * item)


def all_gather_matmul(M: int, N: int, K: int, item: int, W: int) -> Least:
    """x [M/W, K], w [N, K], bias [N] -> y [M, N]. Every other rank multiplies x, which travels, as in all_gather:
    weights and products could instead, but are larger in the shapes here."""
    return Least((M / W * K + N * K + N) * item, M * N * item, (W - 1) * M / W * K * item)


def matmul_reduce_scatter(M: int, N: int, K: int, item: int, W: int) -> Least:
    """x [M, K], w [N, K], bias [N], residual [M/W, N] -> y [M/W, N]. Partial sums travel as in reduce_scatter."""
    sent = reduce_scatter(M * N, item, W)
    return Least((M * K + N * K + N + M / W * N) * item, sent.written, sent.to_peers)


def matmul_all_reduce(M: int, N: int, K: int, item: int, W: int) -> Least:
    """As matmul_reduce_scatter with residual and y [M, N], sent as in all_reduce."""
    sent = all_reduce(M * N, item, W)
    return Least((M * K + N * K + N + M * N) * item, sent.written, sent.to_peers)


def vocab_cross_entropy(T: int, columns: int, item: int, W: int) -> Least:
    """logits [T, columns] and target [T] int64 -> the loss and how many, stats [2, T] float32 on every rank.

    Of each row the max and the sum of exponentials are wanted everywhere: an all_reduce of 2 numbers. The target's
    logits, and the sums of x for smoothing, are wanted as one sum over the rows only: 8 bytes more.
    """
    sent = all_reduce(2 * T, 4, W)
    return Least(T * columns * item + 8 * T, 8 + 8 * T, sent.to_peers + 2 * (W - 1) / W * 8)


def vocab_cross_entropy_dlogits(T: int, columns: int, item: int, W: int) -> Least:
    """logits and dlogits [T, columns], target [T] int64, float32 stats [2, T] and the loss's gradient; all is local."""
    return Least(T * columns * item + 16 * T + 4, T * columns * item, 0)
