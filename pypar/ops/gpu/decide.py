"""Which algorithm a GPU op uses: pure functions of sizes, dtype and world size, never of local state.

The figures are published ones of one NVLink generation, not measured here; what a machine reaches is measured by
`make gpu`, and given by `set_limits` on every rank alike.
"""

from __future__ import annotations

from dataclasses import dataclass

ONE_SHOT_BYTES = 256 << 10
PIECE_BYTES = 64 << 20  # of a large message that goes through the slots in pieces
FEWEST_ROWS = 48


@dataclass(frozen=True)
class Limits:
    """flops: of a half-precision matmul, per second. bytes_per_s: one way between two GPUs.

    multimem: large sums and averages of all_reduce may be added by the NVLink switch (NVLink SHARP), if it can.
    All ranks get the same bits, but not those of a sum in rank order, and not necessarily those of another run. Half
    types are summed in float32, and rounded before an average is scaled. Determinism "layout" does not let it.
    """

    flops: float = 650e12
    bytes_per_s: float = 390e9
    multimem: bool = False

    def __post_init__(self) -> None:
        if not self.flops > 0 or not self.bytes_per_s > 0:
            raise ValueError(f"Limits: flops {self.flops} and bytes_per_s {self.bytes_per_s} must be positive")


_limits = Limits()


def set_limits(limits: Limits) -> None:
    """What the GPUs reach; the same call on every rank, before the first fused op."""
    global _limits
    _limits = limits


def gain(columns: int, world_size: int, limits: Limits | None = None) -> float:
    """What overlap can gain at best over matmul, then communication: 1 + min(r, 1/r), r = wire / matmul.

    columns: N over all ranks of a column-parallel matmul with a gather, K over all ranks of a row-parallel one with a
    scatter. M cancels, and so does the width of the elements: wider ones multiply as much slower as they travel.
    """
    limits = limits or _limits
    if world_size == 1 or columns == 0:
        return 1.0
    r = (world_size - 1) * limits.flops / (columns * limits.bytes_per_s)
    return 1 + min(r, 1 / r)


def fuses(rows: int) -> bool:
    """Whether a fused matmul runs: below this a plain matmul and a small message are faster.

    Not by gain(): it takes the columns of all ranks, and where those are uneven a rank only knows its own. Ranks that
    decide differently would wait for each other.
    """
    return rows >= FEWEST_ROWS


def all_reduce_algorithm(nbytes: int, can_multimem: bool = False) -> str:
    """one_shot: everything to everybody. two_shot: each rank reduces its part and gives it to all. multimem: as
    two_shot, but the switch adds; can_multimem: it could, as all ranks know; it does where Limits ask for it.
    """
    if nbytes <= ONE_SHOT_BYTES:
        return "one_shot"
    return "multimem" if can_multimem and _limits.multimem else "two_shot"
