"""What the references share: every rank's tensor, in rank order, and the sum the ops promise."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_group_size_by_name
from torch.distributed.distributed_c10d import _resolve_process_group as resolve_process_group

_HALF = (torch.float16, torch.bfloat16)


# Of 0.0 and -0.0 the earlier one, so that the bits are the same everywhere; torch.minimum gives this or that one,
# depending on where in the tensor they are. A NaN stays, as in torch.minimum.
def _minimum(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.where((b < a) | (b != b), b, a)


def _maximum(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.where((b > a) | (b != b), b, a)


REDUCTIONS: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "sum": torch.add,
    "avg": torch.add,
    "max": _maximum,
    "min": _minimum,
    "product": torch.mul,
    "band": torch.bitwise_and,
    "bor": torch.bitwise_or,
    "bxor": torch.bitwise_xor,
}


def group_of(group_name: str) -> dist.ProcessGroup:
    return resolve_process_group(dist.GroupName(group_name))


def size_of(group_name: str) -> int:
    """Ranks in the group; torch.compile takes it as a constant."""
    # Not through dist.GroupName, which torch.compile can't trace.
    return _get_group_size_by_name(group_name)  # type: ignore[arg-type]


def from_all_ranks(x: torch.Tensor, group_name: str) -> list[torch.Tensor]:
    """x of every rank, in rank order. Shapes may differ in dim 0."""
    group = group_of(group_name)
    rows = torch.zeros(group.size(), dtype=torch.int64)
    rows[group.rank()] = x.shape[0] if x.dim() else 1
    dist.all_reduce(rows, group=group)
    most = int(rows.max())
    padded = x.new_zeros((most, *x.shape[1:])) if x.dim() else x.new_zeros(1)
    padded[: x.shape[0] if x.dim() else 1] = x
    gathered = [torch.empty_like(padded) for _ in range(group.size())]
    dist.all_gather(gathered, padded, group=group)
    return [t[:n] if x.dim() else t[0] for t, n in zip(gathered, rows.tolist(), strict=True)]


def reduce_in_rank_order(parts: list[torch.Tensor], op: str) -> torch.Tensor:
    """parts[0] op parts[1] op ..., half types accumulated in float32 and rounded once."""
    if op not in REDUCTIONS:
        raise ValueError(f"unknown reduction '{op}'; use one of {', '.join(REDUCTIONS)}")
    dtype = parts[0].dtype
    if op == "avg" and not dtype.is_floating_point:
        raise ValueError(f"the reduction avg has no meaning for {dtype}; sum and divide, or cast to a floating type")
    total = parts[0].float() if dtype in _HALF else parts[0].clone()
    for part in parts[1:]:
        total = REDUCTIONS[op](total, part.to(total.dtype))
    if dtype == torch.bool:
        total = total.bool()
    if op == "avg":
        total = total * (1.0 / len(parts))
    return total.to(dtype)


def rows_per_rank(rows: int, world_size: int, splits: list[int] | None) -> list[int]:
    """Rows of dim 0 per rank: splits, or ceil(rows / world_size) each, the last ranks fewer or none."""
    if splits is not None:
        return list(splits)
    per = -(-rows // world_size)
    return [max(0, min(per, rows - r * per)) for r in range(world_size)]
